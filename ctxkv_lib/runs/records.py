"""Records of finished stages: what each stage was made from, and how to compare two records.

A run is computed in stages. Each finished stage has a record, `checkpoint/NAME.json`, with a table of what
the stage was *made from*: the settings that affect it (such as `phase2.learning_rate`), digests of code and
texts, the precision, and a digest of each earlier stage that it used. A stage is reused if its recorded table
equals its current table and its files are intact. Otherwise, a message lists the entries that differ.
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

OUTPUT_OF = "output of "  # prefix for digests of earlier stages
# This setting is ignored when records are compared, since only the content of the file matters.
LOCATION = "data.path"
MOST_DESCRIBED = 3  # maximum number of differences per message


@dataclass(frozen=True)
class Record:
    """The record of a finished stage.

    Attributes:
        made_from: table of what the stage was made from.
        files: size and checksum of each file, by its path in the run folder. The value is empty if users may
            edit the file (e.g. a report); such a file only has to exist.
        result: the stage's part of the summary.
        metrics: the stage's lines of metrics.jsonl, with the memory use of each epoch.
        memory: memory snapshots that were taken during the stage.
    """

    made_from: Table
    files: dict[str, str] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> "Record | None":
        """Read a record. Return None if the file is missing or damaged."""
        try:
            values = read_json(file)
            return cls(**values) if values.pop("checksum") == digest(values) else None
        except (DamagedFile, OSError, TypeError, AttributeError, LookupError):
            return None

    def write(self, file: Path) -> None:
        """Write the record with its own checksum."""
        values = asdict(self)
        write_json(file, {"checksum": digest(values), **values})

    @property
    def output(self) -> str:
        """Return a digest of this stage's table and files. Later stages list the digest in their tables."""
        return digest([self.made_from, self.files])

    @property
    def numbers(self) -> str:
        """Return a digest of the result and the metrics, without memory use."""
        metrics = [{name: metric[name] for name in metric if name != "memory"} for metric in self.metrics]
        return digest([self.result, metrics])

    @property
    def outputs_before(self) -> dict[str, str]:
        """Return, for each earlier stage that this stage used, its `output` when this stage was computed."""
        outputs = {name: value for name, value in self.made_from.items() if name.startswith(OUTPUT_OF)}
        return {name.removeprefix(OUTPUT_OF): output for name, output in outputs.items()}

    def damage(self, folder: Path, only_size: bool = False, parts: tuple[str, ...] = ("",)) -> str:
        """Describe the first missing or damaged file in a run folder. Return "" if all files are intact.

        Args:
            only_size: whether to compare only the sizes of files, not their contents.
            parts: beginnings of the paths to check, e.g. "caches". By default, all files are checked.
        """
        files = {folder / name: known for name, known in self.files.items() if name.startswith(parts)}
        return next(filter(None, (damage(file, known, only_size) for file, known in files.items())), "")


def as_json(table: Mapping[str, Any]) -> Table:
    """Return a table as it would be read back from a JSON file, with lists instead of tuples."""
    table_read: Table = json.loads(json.dumps(table))
    return table_read


def differences(before: Table, now: Table, names: Sequence[str] | None = None) -> Table:
    """Return `{name: (before, now)}` for all names whose values differ. By default, compare all names."""
    considered = {**before, **now} if names is None else names
    pairs = {name: (before.get(name), now.get(name)) for name in considered if name != LOCATION}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def is_setting(name: str) -> bool:
    """Return whether an entry of a table is a setting, such as `phase2.patience`, and not a digest."""
    return "." in name or name in ("preset", "recipe")


def describe_differences(pairs: Table, between: str = " → ") -> str:
    """Describe differences in words. Show the values of settings and the precision, but no digests."""
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
