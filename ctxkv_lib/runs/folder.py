"""The folder of a run: the records of its finished stages, and a lock for the process that uses the folder.

A run folder has these files:

- `checkpoint/settings.json`, `contexts.json`, `phase2.json`, `model.json`, `test.json`, `ngrams.json` and
  `results.json` are the records of finished stages (see `records`). `driver` writes them.
- `config.json`, and `own_parts/{block,loss,layer}.py` with the source text of the user's own parts, are
  written by the stage `settings`.
- `metrics.jsonl` gets one line per metric while a stage trains. The stage `results` rewrites it.
- `checkpoint/context_block.safetensors` and `caches/{train,val}_{ctx,emb}.safetensors` are written by the
  stage `contexts`, or are links to the files of another run in the same parent folder.
- `checkpoint/weights.safetensors` has all weights except the token table. The stage `phase2` writes it; while
  it trains, `training` writes `checkpoint/phase2.pt`.
- `model/` is written by the stage `model` (module `export`).
- `summary.json`, `report.md`, `report.ja.md` and `figures/` are written by the stage `results` (module
  `experiments`).
- `model/README.md`, the model card, is written by the stage `results` or `model` if it is missing.
- `evaluation/` is written by the command `ctxkv evaluate`. Hidden `.part` files are written by
  `files.replacing`, and `.lock` is written by this module.

A stage's files are written first and its record last, so the record is valid even after a kill. Every file is
written under a temporary name and then renamed. Equal tensor files of runs in the same parent folder are hard
links to one file (`links`). Replacing the file of one run leaves the files of the other runs unchanged.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import DamagedFile, UserError
from ..files import remove, visible_files, write_text
from ..method.loop import Metric
from .config import ExperimentConfig, config_from_dict
from .records import Record

RECORDS, LOCK, COMPARISON = "checkpoint", ".lock", "comparison.json"
SETTINGS, RESULTS = "settings", "results"  # names of stages
MODEL = "model"  # the stage of the saved model
TABLE_SHARD = "model/model-00001-of-"  # start of the token table's path
OLD_RECORD = f"{RECORDS}/stages.json"  # record file until version 0.3
# Pattern that finds the runs in a folder. It skips hidden folders, which hold half-written runs.
RUNS_BELOW = f"[!.]*/{RECORDS}/{SETTINGS}.json"


@dataclass
class RunFolder:
    """A run on disk: the path of its folder, and all its readable records by stage name."""

    path: Path
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "RunFolder":
        """Read the records in a folder. Damaged records are left out."""
        records = {file.stem: Record.read(file) for file in sorted((path / RECORDS).glob("[!.]*.json"))}
        return cls(path, {name: record for name, record in records.items() if record})

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Read the records of a run.

        Raises:
            UserError: The folder holds no run or a run of another version, or its first record is damaged.
        """
        folder = cls.read(path)
        if SETTINGS in folder.records:
            return folder
        if folder.record_file(SETTINGS).is_file():
            raise DamagedFile(folder.record_file(SETTINGS), "its checksum differs")
        raise UserError(_no_run(path))

    @property
    def config(self) -> ExperimentConfig:
        """The configuration of the run. Raises UserError if this version does not know a setting."""
        try:
            return config_from_dict(self.records[SETTINGS].result)
        except (UserError, AttributeError, LookupError, TypeError):
            raise UserError(_other_version(self.path)) from None

    def sibling_records(self, stage: str) -> Iterator[tuple[Path, Record]]:
        """For each other run in the same parent folder with a record of `stage`, yield path and record."""
        for file in sorted(self.path.parent.glob(f"[!.]*/{RECORDS}/{stage}.json")):
            if file.parents[1] != self.path and (record := Record.read(file)):
                yield file.parents[1], record

    def record_file(self, stage: str) -> Path:
        return self.path / RECORDS / f"{stage}.json"

    def holds(self, stage: str) -> bool:
        """Return whether a stage has a record that matches the current records of earlier stages."""
        return stage in self.records and all(
            self.holds(before) and self.records[before].output == output
            for before, output in self.records[stage].outputs_before.items()
        )

    def unreadable(self, stage: str = "[!.]*") -> str:
        """Describe the first damaged record (only of `stage`, if given). Return "" if none is damaged."""
        files = sorted((self.path / RECORDS).glob(f"{stage}.json"))
        return next((f"{file} is damaged" for file in files if file.stem not in self.records), "")

    def damage(self) -> str:
        """Describe the first record or file that is damaged or missing. Return "" if all are intact.

        This compares only the sizes of files, not their contents.
        """
        descriptions = (record.damage(self.path, only_size=True) for record in self.records.values())
        return self.unreadable() or next(filter(None, descriptions), "")

    def write(self, stage: str, record: Record) -> Record:
        """Write the record of a finished stage."""
        record.write(self.record_file(stage))
        self.records[stage] = record
        return record

    def drop(self, stage: str) -> None:
        """Delete the record of a stage, if there is one."""
        remove(self.record_file(stage))
        self.records.pop(stage, None)

    def metrics(self, stages: Iterable[str]) -> list[Metric]:
        """Return all metrics of the given stages, in order."""
        return [metric for stage in stages for metric in self.records[stage].metrics]

    def write_metrics(self, stages: Iterable[str]) -> None:
        """Rewrite metrics.jsonl so that it has only the metrics of the given stages."""
        write_text(self.path / "metrics.jsonl", "".join(map(_line, self.metrics(stages))))

    def append_metric(self, metric: Metric) -> None:
        """Append a metric to metrics.jsonl, so that users can follow the progress of training."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(metric))


def _line(metric: Metric) -> str:
    values = {name: value for name, value in metric.items() if name not in ("memory", "replayed")}
    return json.dumps(values) + "\n"


def _no_run(path: Path) -> str:
    """Return a message that says why a folder is not a run and what the user should do."""
    if (path / OLD_RECORD).is_file():
        return _other_version(path)
    if any(path.glob(RUNS_BELOW)):
        return f"{path} is not a run but holds runs; name one of them (`ctxkv list {path}` shows them)."
    if is_run_folder(path):
        return f"{path} is a run whose record is missing; recompute it with `ctxkv run --out {path}`."
    if (path / COMPARISON).is_file():
        return f"{path} holds a comparison; name one of its runs (`ctxkv list {path.parent}` shows them)."
    return f"{path} holds no run; find runs with `ctxkv list`, or make a run with `ctxkv run --out {path}`."


def _other_version(path: Path) -> str:
    return f"{path} holds a run of another version of ctxkv_lib; use that version, or another folder."


def is_run_folder(path: Path) -> bool:
    """Return whether a folder is a run folder, even if config.json or the first record is lost."""
    marks = (path / "config.json", path / RECORDS / f"{SETTINGS}.json")
    return (path / RECORDS).is_dir() and any(mark.is_file() for mark in marks)


@contextmanager
def claimed(path: Path, again: bool = False) -> Iterator[RunFolder]:
    """Context manager that reads a run's records and locks the run's folder for this process.

    Args:
        again: whether the block may replace a run from version 0.3, or a result whose records are lost.

    Raises:
        UserError: The folder is in use, has files but no run, or has a result that needs `again`.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name another folder with --out.")
    is_new = not path.exists()
    new_parents = [parent for parent in path.parents if not parent.exists()]
    with locked(path):
        if any(visible_files(path)) and not is_run_folder(path):
            raise UserError(f"{path} is not empty and holds no run; name another folder with --out.")
        if (path / OLD_RECORD).is_file() and not again:
            raise UserError(f"{_other_version(path)[:-1]}, or replace the run with --again.")
        remove(path / OLD_RECORD)
        folder = RunFolder.read(path)
        if (path / "summary.json").is_file() and "phase2" not in folder.records and not again:
            raise UserError(
                f"{path} holds a result whose record is lost; replace it with --again, or name another "
                "folder with --out."
            )
        for leftover in path.rglob(".*.part"):  # left by a killed process
            remove(leftover)
        (path / RECORDS).mkdir(exist_ok=True)
        try:
            yield folder
        except BaseException:
            if (
                is_new
                and not {*folder.records} - {SETTINGS}
                and not any(path.glob(f"{RECORDS}/*.safetensors"))
            ):
                shutil.rmtree(path)  # nothing was computed
                for parent in new_parents:
                    with suppress(OSError):  # another run may be there
                        parent.rmdir()
            raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a folder while a `with` block runs. Raises UserError if another process has locked it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{path} is in use by another process; wait until it is done, or name another folder."
        ) from None
    with lock:
        yield
