"""`checkpoint/stages.json`: inputs, files and numbers of every finished stage.

A record is valid only while each of its files has the recorded checksum.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DamagedFile
from ..files import read_sealed_json, state, write_sealed_json
from ..method.loop import Metric

SummaryPart = dict[str, Any]
MEASUREMENTS = ("ngrams", "probe")
STAGES = ("phase1", "caches", "phase2", "model", "test", "results")  # each computed from those before it
FILE = "checkpoint/stages.json"


@dataclass(frozen=True)
class Record:
    """The record of a finished stage.

    Attributes:
        key: digest of everything it depends on.
        files: checksum of each of its files, by its path in the run folder.
        result: its part of the summary.
        metrics: its lines of metrics.jsonl.
    """

    key: str
    files: dict[str, str]
    result: SummaryPart = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)

    def states(self, folder: Path) -> Iterator[tuple[str, str]]:
        """Yield each file's path and whether it is `intact`, `missing` or `damaged`."""
        for name, expected in self.files.items():
            yield name, state(folder / name, expected)

    def lost(self, folder: Path, names: Iterable[str] | None = None) -> str:
        """Name a missing or damaged file, of all or of those named; empty if all are intact."""
        lost = (
            f"{folder / name} is {how}"
            for name, how in self.states(folder)
            if how != "intact" and (names is None or name in names)
        )
        return next(lost, "")


@dataclass
class Records:
    """The records of one run folder, with their configuration and code."""

    folder: Path
    config: dict[str, Any]
    code: str
    stages: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Records | None":
        """Read the records in the folder; None if it has none.

        Raises:
            DamagedFile: the file is not what was written, or not by this version.
        """
        try:
            values = read_sealed_json(folder / FILE)
            stages = {name: Record(**record) for name, record in values["stages"].items()}
            return cls(folder, values["config"], values["code"], stages)
        except FileNotFoundError:
            return None
        except (AttributeError, KeyError, TypeError):
            raise DamagedFile(folder / FILE, "another version of ctxkv_lib wrote it") from None

    def add(self, stage: str, record: Record) -> Record:
        """Write a stage's record to the disk, and remove that of the results, which depend on `STAGES`."""
        if stage in STAGES:
            self.stages.pop("results", None)
        self.stages[stage] = record
        self.write()
        return record

    def remove(self, stage: str) -> None:
        """Remove a stage's record from the disk."""
        self.stages.pop(stage, None)
        self.write()

    def write(self) -> None:
        stages = {name: asdict(record) for name, record in self.stages.items()}
        write_sealed_json(self.folder / FILE, {"config": self.config, "code": self.code, "stages": stages})
