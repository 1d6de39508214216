"""What a finished stage was made from, and how two such tables are compared.

A run is made in stages. When a stage is finished, its record, `checkpoint/NAME.json`, says what the stage was
*made from*: one flat table with the settings that matter (`phase2.learning_rate`), digests of code and texts,
the precision, and a digest of each earlier stage it was computed from. Two tables are equal or they differ in
named values, and everything else follows from that: a stage is reused if its table equals the one that is
asked for and its files are intact; otherwise the difference says why it is recomputed or refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DamagedFile
from ..files import damage, digest, read_json, write_json
from ..method.loop import Metric

Table = dict[str, Any]  # JSON values by name

OUTPUT_OF = "output of "  # begins the name under which a table has the digest of an earlier stage
LOCATION = "data.path"  # a setting that does not identify an experiment: the content of the file counts
MOST_DESCRIBED = 3  # differences in one message


@dataclass(frozen=True)
class Record:
    """A finished stage.

    Attributes:
        made_from: what the stage was made from.
        files: size and checksum of each file, by its path in the run folder. The value is empty for a file
            that users may edit, such as a report: it only has to exist.
        result: the stage's part of the summary.
        metrics: the stage's lines of metrics.jsonl, each with the memory of its epoch if it has one.
        memory: memory snapshots that were taken during the stage.
    """

    made_from: Table
    files: dict[str, str] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> "Record | None":
        """Read a record; return None if the file is missing or is not what was written."""
        try:
            values = read_json(file)
            return cls(**values) if values.pop("checksum") == digest(values) else None
        except (DamagedFile, OSError, TypeError, AttributeError, LookupError):
            return None

    def write(self, file: Path) -> None:
        """Write the record with a checksum of its own."""
        values = asdict(self)
        write_json(file, {"checksum": digest(values), **values})

    @property
    def output(self) -> str:
        """Digest what later stages are made from: this stage's table and files, but not its numbers."""
        return digest([self.made_from, self.files])

    @property
    def numbers(self) -> str:
        """Digest the result and the metrics, without the memory that they took."""
        metrics = [{name: metric[name] for name in metric if name != "memory"} for metric in self.metrics]
        return digest([self.result, metrics])

    @property
    def outputs_before(self) -> dict[str, str]:
        """Return the stages that this one was made from, each with the output that it had then."""
        outputs = {name: value for name, value in self.made_from.items() if name.startswith(OUTPUT_OF)}
        return {name.removeprefix(OUTPUT_OF): output for name, output in outputs.items()}

    def damage(self, folder: Path, only_size: bool = False, parts: tuple[str, ...] = ("",)) -> str:
        """Describe the first missing or damaged file in a run folder; return "" if all are intact.

        Args:
            only_size: compare the sizes of files and not their contents.
            parts: files and folders to look at, by the beginning of their paths.
        """
        files = {folder / name: known for name, known in self.files.items() if name.startswith(parts)}
        return next(filter(None, (damage(file, known, only_size) for file, known in files.items())), "")


def as_json(table: Mapping[str, Any]) -> Table:
    """Return a table as it will be read from its file: JSON has no tuples."""
    table_read: Table = json.loads(json.dumps(table))
    return table_read


def differences(before: Table, now: Table, names: Sequence[str] | None = None) -> Table:
    """Return `{name: (before, now)}` for each name whose values differ; by default all names count."""
    considered = {**before, **now} if names is None else names
    pairs = {name: (before.get(name), now.get(name)) for name in considered if name != LOCATION}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def is_setting(name: str) -> bool:
    """Return whether a name of a table is a setting, such as `phase2.patience`; the others are digests."""
    return "." in name or name in ("preset", "recipe")


def describe_differences(pairs: Table, between: str = " → ") -> str:
    """Describe differences: settings and the precision with both values, digests by their names."""
    words = []
    for name, (before, now) in pairs.items():
        if name.startswith(OUTPUT_OF):
            words.append(f"the files of {name.removeprefix(OUTPUT_OF)} differ")
        elif is_setting(name) or name == "precision":
            words.append(f"{name} {before}{between}{now}")
        else:
            words.append(f"the {name} differs")
    more = len(words) - MOST_DESCRIBED
    return ", ".join(words[:MOST_DESCRIBED]) + (f" and {more} more" if more > 0 else "")
