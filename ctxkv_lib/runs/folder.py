"""The folder of one run: the records of its finished stages, and the lock of the process that works in it.

The files, and who writes them:

- `checkpoint/settings.json`, `contexts.json`, `phase2.json`, `model.json`, `test.json`, `ngrams.json`,
  `results.json`: the records of finished stages (see `records`), by `driver`;
- `config.json`, and `own_parts/{block,loss,layer}.py`, the source text of the user's own parts: the stage
  `settings`; `metrics.jsonl`: line by line the stage that trains, at the end the stage `results`;
- `checkpoint/context_block.safetensors`, `caches/{train,val}_{ctx,emb}.safetensors`: the stage `contexts`, or
  links to the files of a run beside this one;
- `checkpoint/weights.safetensors`, all weights except the token table: the stage `phase2`; while it trains,
  `checkpoint/phase2.pt`: `training`;
- `model/`: the stage `model` (`export`);
- `summary.json`, `report.md`, `report.ja.md`, `figures/`: the stage `results`, in `experiments`;
- `model/README.md`, the model card: whichever of the stages `results` and `model` finds a model without it;
- `evaluation/`: the command `ctxkv evaluate`; hidden `.part` files: `files.replacing`; `.lock`: this module.

A stage's files are written first and its record last, each by a rename, so the record is valid even after a
kill. Equal tensor files of a run and of the runs beside it are one file with several names (`links`): a file
that changes is always written beside and renamed.
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
SETTINGS, RESULTS = "settings", "results"  # the first stage of every run, and the last of one without a model
MODEL = "model"  # the stage of the saved model
TABLE_SHARD = "model/model-00001-of-"  # how the path of the saved token table begins in a run folder
OLD_RECORD = f"{RECORDS}/stages.json"  # of version 0.3 and before
RUNS_BELOW = f"[!.]*/{RECORDS}/{SETTINGS}.json"  # hidden folders are half-written copies


@dataclass
class RunFolder:
    """A run on disk: its path, and the records that can be read, by stage."""

    path: Path
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "RunFolder":
        """Read the records in a folder; a record that cannot be read counts as none."""
        records = {file.stem: Record.read(file) for file in sorted((path / RECORDS).glob("[!.]*.json"))}
        return cls(path, {name: record for name, record in records.items() if record})

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Read the records of a run.

        Raises:
            UserError: the folder holds no run, or the run of another version.
        """
        folder = cls.read(path)
        if SETTINGS in folder.records:
            return folder
        if folder.record_file(SETTINGS).is_file():
            raise DamagedFile(folder.record_file(SETTINGS), "its checksum differs")
        raise UserError(_no_run(path))

    @property
    def config(self) -> ExperimentConfig:
        """The configuration of the run; raises UserError if this version does not know a setting."""
        try:
            return config_from_dict(self.records[SETTINGS].result)
        except (UserError, AttributeError, LookupError, TypeError):
            raise UserError(_other_version(self.path)) from None

    def record_file(self, stage: str) -> Path:
        return self.path / RECORDS / f"{stage}.json"

    def holds(self, stage: str) -> bool:
        """Return whether a stage is recorded and was made from the stages that are recorded now."""
        return stage in self.records and all(
            self.holds(before) and self.records[before].output == output
            for before, output in self.records[stage].outputs_before.items()
        )

    def unreadable(self, stage: str = "[!.]*") -> str:
        """Describe the record that cannot be read, of one stage or the first of all; "" if there is none."""
        files = sorted((self.path / RECORDS).glob(f"{stage}.json"))
        return next((f"{file} is damaged" for file in files if file.stem not in self.records), "")

    def damage(self) -> str:
        """Describe the first record or file that is missing or damaged, judged by sizes; "" if none is."""
        descriptions = (record.damage(self.path, only_size=True) for record in self.records.values())
        return self.unreadable() or next(filter(None, descriptions), "")

    def write(self, stage: str, record: Record) -> Record:
        """Record a finished stage."""
        record.write(self.record_file(stage))
        self.records[stage] = record
        return record

    def drop(self, stage: str) -> None:
        """Delete the record of a stage, if there is one."""
        remove(self.record_file(stage))
        self.records.pop(stage, None)

    def metrics(self, stages: Iterable[str]) -> list[Metric]:
        """Return the metrics of these stages, in order."""
        return [metric for stage in stages for metric in self.records[stage].metrics]

    def write_metrics(self, stages: Iterable[str]) -> None:
        """Write metrics.jsonl anew, with the lines of `metrics`."""
        write_text(self.path / "metrics.jsonl", "".join(map(_line, self.metrics(stages))))

    def append_metric(self, metric: Metric) -> None:
        """Add a line to metrics.jsonl, which shows a training run under way."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(metric))


def _line(metric: Metric) -> str:
    values = {name: value for name, value in metric.items() if name not in ("memory", "replayed")}
    return json.dumps(values) + "\n"


def _no_run(path: Path) -> str:
    """Explain why a folder holds no run, and what to name instead."""
    if (path / OLD_RECORD).is_file():
        return _other_version(path)
    if any(path.glob(RUNS_BELOW)):
        return f"{path} holds runs and is none; name one of them (`ctxkv list {path}` shows them)."
    if is_run_folder(path):
        return f"The record of the run in {path} is gone; make it again with `ctxkv run --out {path}`."
    if (path / COMPARISON).is_file():
        return f"{path} holds a comparison; name its runs, as `ctxkv list {path.parent}` shows them."
    return f"{path} holds no run; `ctxkv list` shows where runs are, `ctxkv run --out {path}` makes one."


def _other_version(path: Path) -> str:
    return f"{path} holds a run of another version of ctxkv_lib; use that version, or another folder."


def is_run_folder(path: Path) -> bool:
    """Return whether a folder is that of a run, even if one of config.json and the first record is lost."""
    marks = (path / "config.json", path / RECORDS / f"{SETTINGS}.json")
    return (path / RECORDS).is_dir() and any(mark.is_file() for mark in marks)


@contextmanager
def claimed(path: Path, again: bool = False) -> Iterator[RunFolder]:
    """Keep a run's folder for this process while the block runs.

    Args:
        again: also take a folder with a run of version 0.3, or with a result whose records are lost.

    Raises:
        UserError: the folder is in use, or holds other files or a result that may not be replaced.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name another folder with --out.")
    is_new = not path.exists() or not any(path.iterdir())
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
        for leftover in path.rglob(".*.part"):  # of a killed process
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
                    with suppress(OSError):  # another run may have begun in it
                        parent.rmdir()
            raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; raises UserError if one is in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{path} is in use by another process; wait until that is done, or name another folder."
        ) from None
    with lock:
        yield
