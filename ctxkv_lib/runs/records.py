"""`checkpoint/stages.json`: what every finished stage was made from, the very files it left, and its numbers.

A record counts only as long as each of its files is the one it was made with, by checksum.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import ranks
from ..errors import DamagedFile
from ..files import read_json, read_sealed_json, state, write_sealed_json
from ..progress import Metric

STAGES = ("phase1", "caches", "phase2", "model", "test", "results")  # each made from those before it
MEASURES = ("probe", "ablations", "recall_task", "generation", "ngrams")  # made only when asked for
FILE = "checkpoint/stages.json"
DROPPED = "dropped"  # in the place of the checksum of a file that was removed to save disk space


@dataclass(frozen=True)
class Record:
    """What a finished stage left.

    Attributes:
        key: a digest of everything it was made from.
        files: checksum of each of its files, or `DROPPED`, by its path in the run folder.
        result: its part of the summary.
        metrics: its lines of metrics.jsonl.
    """

    key: str
    files: dict[str, str]
    result: dict[str, Any] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)

    def states(self, folder: Path) -> Iterator[tuple[str, str]]:
        """Each file's path and whether it is `intact`, `missing`, `damaged` or `dropped`."""
        for name, expected in self.files.items():
            yield name, DROPPED if expected == DROPPED else state(folder / name, expected)


class Records:
    """The records of one run folder, and the configuration they belong to."""

    def __init__(self, folder: Path, config: dict[str, Any], stages: dict[str, Record] | None = None) -> None:
        self.folder = folder
        self.config = config
        self.stages = stages or {}

    @classmethod
    def read(cls, folder: Path) -> "Records | None":
        """What the folder holds; None if that is nothing, or was written before records had checksums.

        Raises:
            DamagedFile: the file is not what was written.
        """
        path = folder / FILE
        try:
            values = read_sealed_json(path)
        except FileNotFoundError:
            return None
        except DamagedFile:
            older = read_json(path)
            if isinstance(older, dict) and "contexts" in older:  # a stage of earlier versions
                return None
            raise
        stages = {name: Record(**record) for name, record in values["stages"].items()}
        return cls(folder, values["config"], stages)

    def add(self, stage: str, record: Record) -> None:
        """Put a stage's record on the disk. The results, made from all others, are no longer theirs."""
        self.stages = {name: held for name, held in self.stages.items() if name != "results"}
        self.stages[stage] = record
        if not ranks.index():
            self.write()

    def drop(self, parts: Iterable[str]) -> None:
        """Put on the disk that all files at and below `parts`, paths in the folder, are dropped."""
        whole = tuple(f"{part}/" for part in parts)
        for name, record in self.stages.items():
            kept = {f: DROPPED if f"{f}/".startswith(whole) else known for f, known in record.files.items()}
            self.stages[name] = replace(record, files=kept)
        self.write()

    def write(self) -> None:
        stages = {name: asdict(record) for name, record in self.stages.items()}
        write_sealed_json(self.folder / FILE, {"config": self.config, "stages": stages})
