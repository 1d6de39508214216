"""The folder of one run, and its record: settings, and key, files and numbers of each finished stage.

One rule: a stage counts if its key is the one asked for (see `keys`) and each of its files has the recorded
checksum. A stage's files are written first, its record last, each by a rename: after a kill the record is
true.

The files, and who writes them:

- `checkpoint/stages.json`, the record, and `.lock`: this module; `config.json`: `claimed`, at the end
  `write_results`;
- `metrics.jsonl`: `Experiment.record` line by line; anew: `write_metrics`, when a phase begins and at the
  end;
- `checkpoint/context_block.safetensors`, `caches/{train,val}_{ctx,emb}.safetensors`: `stages`, or `link`;
- `checkpoint/layer.safetensors`, all that Phase 2 trains: `stages`; while it trains,
  `checkpoint/phase2.safetensors`: `saved_epochs`;
- `model/`: `export.save_for_transformers`;
- `summary.json`, `report.md`, `report.ja.md`, `figures/`, `model/README.md`: `experiments.write_results`;
- `evaluation/`: the command `ctxkv evaluate`; hidden `.part` files: `files.replacing`.

Measurements are stages of the record, too (`measure.measurements`).
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import DamagedFile, UserError
from ..files import (
    checksums,
    damage,
    digest,
    read_json,
    remove,
    replacing,
    visible_files,
    write_json,
    write_text,
)
from ..method.loop import Metric
from ..progress import notice
from .config import ExperimentConfig, config_from_dict, differing_settings
from .keys import MEASUREMENTS

RECORD, LOCK, COMPARISON = "checkpoint/stages.json", ".lock", "comparison.json"
PHASES = ("phase1", "phase2")  # which have metrics
FORMAT = 3  # of the record; raise it when older ones cannot be read
RESULTS = "results"  # the last stage: summary and metrics, from all others
RUNS_BELOW = f"[!.]*/{RECORD}"  # records of runs in a folder; hidden folders are half-written copies
OF_SYSTEM = {"desktop.ini", "Thumbs.db"}  # files that systems create; hidden files are ignored, too
OF_PLACE = {"data.path"}  # settings that do not make another experiment: the text counts, not where it lies


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        key: digest of everything it depends on.
        files: size and checksum of each of its files, by its path in the run folder.
        result: its part of the summary.
        metrics: its lines of metrics.jsonl.
    """

    key: str
    files: dict[str, str] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)

    def damage(self, path: Path, only_size: bool = False) -> str:
        """Describe the first missing or damaged file in a run's folder; empty if all are intact."""
        described = (damage(path / name, known, only_size) for name, known in self.files.items())
        return next(filter(None, described), "")


@dataclass
class RunFolder:
    """One run on disk.

    Attributes:
        origin: what no setting says: digests of code and data, and the precision. Code of plug-ins is part
            of `config`.
    """

    path: Path
    config: ExperimentConfig
    origin: dict[str, str]
    stages: dict[str, Stage] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "RunFolder":
        """Read the record of a run.

        Raises:
            UserError: there is none, or it is not what was written.
        """
        if not (path / RECORD).is_file():
            raise UserError(_no_run(path))
        values = read_json(path / RECORD)
        if not isinstance(values, dict) or values.pop("checksum", None) != digest(values):
            raise DamagedFile(path / RECORD, "its checksum differs")
        with suppress(UserError, AttributeError, LookupError, TypeError):
            stages = {name: Stage(**stage) for name, stage in values["stages"].items()}
            if values["format"] == FORMAT:
                return cls(path, config_from_dict(values["config"]), values["origin"], stages)
        raise UserError(
            f"{path} holds a run of another version of ctxkv_lib; use that version, or another folder."
        )

    def write(self) -> None:
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        config = self.config.to_dict()
        values = {"format": FORMAT, "config": config, "origin": self.origin, "stages": stages}
        write_json(self.path / RECORD, {"checksum": digest(values), **values})

    def finished(self, name: str, key: str) -> Stage | None:
        """Return a stage of this run that counts; None if it is to be made."""
        stage = self.stages.get(name)
        if not stage or stage.key != key:
            return None
        if damage := stage.damage(self.path):
            notice(f"{damage}: {name} is made again.")
            return None
        return stage

    @cached_property
    def neighbours(self) -> list["RunFolder"]:
        """The readable runs beside this one."""
        folders = []
        for record in sorted(self.path.parent.glob(RUNS_BELOW)):
            if record.parents[1] != self.path:
                with suppress(UserError, OSError):  # damaged, or of another version
                    folders.append(RunFolder.read(record.parents[1]))
        return folders

    def link(self, name: str, key: str) -> Stage | None:
        """Link the files of a stage that counts from another run beside this one, and record it here."""
        for other in self.neighbours:
            stage = other.stages.get(name)
            if stage and stage.key == key:
                with suppress(OSError):  # its files may have gone
                    for file in stage.files:
                        with replacing(self.path / file) as beside:
                            _link(other.path / file, beside)
                if not stage.damage(self.path):
                    notice(f"{name}: taken from {other.path.name}, same settings, data and code.")
                    return self._add(name, stage)
        return None

    def finish(
        self,
        name: str,
        key: str,
        parts: Iterable[Path] = (),
        result: dict[str, Any] | None = None,
        metrics: Sequence[Metric] = (),
    ) -> Stage:
        """Record a stage with exactly the files at and below `parts`."""
        return self._add(name, Stage(key, checksums(self.path, parts), result or {}, [*metrics]))

    def _add(self, name: str, stage: Stage) -> Stage:
        if name not in MEASUREMENTS:
            self.stages.pop(RESULTS, None)  # which are of the stages
        self.stages[name] = stage
        self.write()
        return stage

    def metrics(self, phases: Sequence[str] = PHASES) -> list[Metric]:
        """Return the lines of metrics.jsonl that these phases have made, in order."""
        return [metric for phase in phases for metric in self.stages[phase].metrics]

    def write_metrics(self, phases: Sequence[str] = PHASES) -> None:
        """Write metrics.jsonl anew, with the lines of these phases."""
        write_text(self.path / "metrics.jsonl", "".join(map(_line, self.metrics(phases))))

    def append_metric(self, metric: Metric) -> None:
        """Add a line to metrics.jsonl, which shows a training under way."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(metric))


def _line(metric: Metric) -> str:
    values = {name: value for name, value in metric.items() if name not in ("memory", "replayed")}
    return json.dumps(values) + "\n"


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # not every file system can
        shutil.copy2(file, to)


def _no_run(path: Path) -> str:
    """Explain why a folder holds no run, and what to name instead."""
    if any(path.glob(RUNS_BELOW)):
        return f"{path} holds runs and is none; name one of them (`ctxkv list {path}` shows them)."
    if _has_lost_its_record(path):
        return f"The record of the run in {path} is gone; make it again with `ctxkv run --out {path} --again`"
    if (path / COMPARISON).is_file():
        return f"{path} holds a comparison; name its runs, as `ctxkv list {path.parent}` shows them."
    return f"{path} holds no run; `ctxkv list` shows where runs are, `ctxkv run --out {path}` makes one."


def _has_lost_its_record(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "checkpoint").is_dir()


@contextmanager
def claimed(
    path: Path, config: ExperimentConfig, origin: dict[str, str], again: bool = False
) -> Iterator[RunFolder]:
    """Keep a run's folder for this process while the block runs.

    Args:
        again: replace a finished result of other code or data.

    Raises:
        UserError: it is in use, or holds another experiment, other files, or a finished result that is not
            to be made `again`.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name another folder with --out.")
    is_new = not path.exists() or not any(path.iterdir())
    with only_process(path):
        folder = _record_for(path, config, origin, again)
        for leftover in path.rglob(".*.part"):  # of a killed process
            remove(leftover)
        try:
            folder.write()
            if RESULTS not in folder.stages:
                write_json(path / "config.json", config.to_dict())
            yield folder
        except BaseException:
            if is_new and not folder.stages and not any(path.glob("checkpoint/*.safetensors")):
                shutil.rmtree(path)  # nothing was made
            raise


@contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Keep other processes out of a folder; a UserError if one is in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{path} is in use by another process; wait until that is done, or name another folder."
        ) from None
    with lock:
        yield


def _record_for(path: Path, config: ExperimentConfig, origin: dict[str, str], again: bool) -> RunFolder:
    """Return the record of this experiment in a folder that is locked, with the stages that are there.

    A folder of other settings is always refused, one with a finished result of another origin unless it is
    to be made `again`.
    """
    if not (path / RECORD).is_file():
        _refuse_other_files(path, again)
        return RunFolder(path, config, origin)
    try:
        existing = RunFolder.read(path)
    except DamagedFile as error:
        if again:
            return RunFolder(path, config, origin)
        raise UserError(f"{error.path} is damaged; replace the run with --again, or use --out.") from None
    changed_code = _compare_settings(existing, config)
    if config.runtime.precision == "auto":  # it goes on as it was begun, maybe on another machine
        origin = {**origin, "precision": existing.origin["precision"]}
    changed = [name for name, known in existing.origin.items() if origin.get(name) != known] + changed_code
    stages = dict(existing.stages)
    results = stages.pop(RESULTS, None) if changed else None  # else a kill would leave them as of this code
    if results and not again:
        raise UserError(
            f"{path} holds a finished result of other {' and '.join(changed)}; replace it with --again "
            "(again=True), or name another folder with --out."
        )
    return RunFolder(path, config, origin, stages)


def _refuse_other_files(path: Path, again: bool) -> None:
    """Refuse a folder with files and without a record, unless it held a run that is to be made `again`."""
    has_files = any(file.name not in OF_SYSTEM for file in visible_files(path))
    if has_files and not (again and (path / "config.json").is_file()):
        cure = "name another folder with --out"
        if _has_lost_its_record(path):
            cure = f"make the run again with --again, or {cure}"
        raise UserError(f"{path} is not empty and has no record of a run ({RECORD}); {cure}.")


def _compare_settings(existing: RunFolder, config: ExperimentConfig) -> list[str]:
    """Refuse a folder of other settings; return the plug-ins whose code is another, as `block.code`."""
    theirs, asked = differing_settings([existing.config, config])
    if settings := [key for key in theirs if key not in OF_PLACE]:
        shown = ", ".join(f"{key} {theirs[key]!r} (asked: {asked[key]!r})" for key in settings[:3])
        raise UserError(f"{existing.path} holds another experiment: {shown}; name another folder with --out.")
    return [
        f"{hook}.code" for hook, plugin in config.plugins.items() if existing.config.plugins[hook] != plugin
    ]
