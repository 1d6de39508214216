"""The folder of one run: the records of its finished stages, and the lock of the process that works in it.

A run folder has these files:

- `checkpoint/settings.json`, `contexts.json`, `phase2.json`, `model.json`, `test.json`, `ngrams.json` and
  `results.json` are the records of finished stages (see `records`). `driver` writes them.
- `config.json`, and `own_parts/{block,loss,layer}.py` with the source text of the user's own parts, are
  written by the stage `settings`.
- `metrics.jsonl` gets a line per metric from the stage that trains. The stage `results` rewrites it.
- `checkpoint/context_block.safetensors` and `caches/{train,val}_{ctx,emb}.safetensors` are written by the
  stage `contexts`, or are links to the files of a neighbouring run (same parent folder).
- `checkpoint/weights.safetensors` has all weights except the token table. The stage `phase2` writes it; while
  it trains, `training` writes `checkpoint/phase2.pt`.
- `model/` is written by the stage `model` (`export`).
- `summary.json`, `report.md`, `report.ja.md` and `figures/` are written by the stage `results`, in
  `experiments`.
- `model/README.md`, the model card, is written by `results` or `model`, whichever finds that it is missing.
- `evaluation/` is written by the command `ctxkv evaluate`, hidden `.part` files by `files.replacing`, and
  `.lock` by this module.

A stage's files are written first and its record last, so the record is valid even after a kill. Every file is
written under a temporary name and then renamed. Equal tensor files of neighbouring runs are stored as one
file with several names (`links`). A rename replaces only one name, so the others keep the old content.
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
SETTINGS, RESULTS = "settings", "results"  # the first stage, and the stage that writes the results
MODEL = "model"  # the stage of the saved model
TABLE_SHARD = "model/model-00001-of-"  # beginning of the token table's path in a run folder
OLD_RECORD = f"{RECORDS}/stages.json"  # the only record file up to version 0.3
RUNS_BELOW = f"[!.]*/{RECORDS}/{SETTINGS}.json"  # pattern without hidden folders, which are half-written


@dataclass
class RunFolder:
    """A run on disk: its path, and its readable records by stage."""

    path: Path
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "RunFolder":
        """Read the records in a folder. Records that cannot be read are left out."""
        records = {file.stem: Record.read(file) for file in sorted((path / RECORDS).glob("[!.]*.json"))}
        return cls(path, {name: record for name, record in records.items() if record})

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Read the records of a run.

        Raises:
            UserError: The folder holds no run, a run of another version, or a damaged first record.
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
        """Yield the path and record of each run in the same parent folder that has a record of `stage`."""
        for file in sorted(self.path.parent.glob(f"[!.]*/{RECORDS}/{stage}.json")):
            if file.parents[1] != self.path and (record := Record.read(file)):
                yield file.parents[1], record

    def record_file(self, stage: str) -> Path:
        return self.path / RECORDS / f"{stage}.json"

    def holds(self, stage: str) -> bool:
        """Return whether a stage is recorded and was made from the current records of earlier stages."""
        return stage in self.records and all(
            self.holds(before) and self.records[before].output == output
            for before, output in self.records[stage].outputs_before.items()
        )

    def unreadable(self, stage: str = "[!.]*") -> str:
        """Describe the first record of `stage` (default: any) that cannot be read; return "" if all can."""
        files = sorted((self.path / RECORDS).glob(f"{stage}.json"))
        return next((f"{file} is damaged" for file in files if file.stem not in self.records), "")

    def damage(self) -> str:
        """Describe the first record or file that is damaged or missing; return "" if all are intact.

        Only the sizes of files are compared.
        """
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
        """Rewrite metrics.jsonl with the metrics of these stages."""
        write_text(self.path / "metrics.jsonl", "".join(map(_line, self.metrics(stages))))

    def append_metric(self, metric: Metric) -> None:
        """Add a line to metrics.jsonl, so that the progress of a training run can be followed."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(metric))


def _line(metric: Metric) -> str:
    values = {name: value for name, value in metric.items() if name not in ("memory", "replayed")}
    return json.dumps(values) + "\n"


def _no_run(path: Path) -> str:
    """Explain why a folder holds no run, and which folder to name instead."""
    if (path / OLD_RECORD).is_file():
        return _other_version(path)
    if any(path.glob(RUNS_BELOW)):
        return f"{path} is not a run but holds runs; name one of them (`ctxkv list {path}` shows them)."
    if is_run_folder(path):
        return f"{path} is a run whose record is missing; make it again with `ctxkv run --out {path}`."
    if (path / COMPARISON).is_file():
        return f"{path} holds a comparison; name its runs, as `ctxkv list {path.parent}` shows them."
    return f"{path} holds no run; `ctxkv list` shows where runs are; `ctxkv run --out {path}` makes one."


def _other_version(path: Path) -> str:
    return f"{path} holds a run of another version of ctxkv_lib; use that version, or another folder."


def is_run_folder(path: Path) -> bool:
    """Return whether a folder is a run folder, even if config.json or the first record is lost."""
    marks = (path / "config.json", path / RECORDS / f"{SETTINGS}.json")
    return (path / RECORDS).is_dir() and any(mark.is_file() for mark in marks)


@contextmanager
def claimed(path: Path, again: bool = False) -> Iterator[RunFolder]:
    """Lock a run's folder for this process while the block runs.

    Args:
        again: whether to accept a run of version 0.3, or a result whose records are lost.

    Raises:
        UserError: The folder is in use, or holds other files or a result that may not be replaced.
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
                    with suppress(OSError):  # another run may have begun there
                        parent.rmdir()
            raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a folder for this process while the block runs. Raises UserError if another process holds it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{path} is in use by another process; wait until it is done, or name another folder."
        ) from None
    with lock:
        yield
