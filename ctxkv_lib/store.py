"""The store: a folder with what several runs can share. It may be deleted at any time.

*Inputs* say how something is computed: its settings, digests of texts, tokens and code, and `before`, the
inputs of what it is made from. They are known before anything is computed. Two things are equal only if their
inputs are. No digest of a computed file is part of inputs, except that tokens count by their content.

An *entry* of the store is a folder `KIND-KEY`, where KEY is a digest of its inputs. It has the entry's files
and `entry.json`, its record. It is written to a folder beside it, which is then renamed, so it is complete
or missing. A lock makes processes that need the same entry wait, so it is computed once. There are four
kinds: `contexts` (Phase 1 and both streams), `table` (token vectors), `tokens`, and `chitchat`
(conversations).

The same inputs can give different bytes on another machine, or with another number of threads. So a record
also says what was *used*: digests of the files of everything that it was made from. They keep apart what does
not belong together, such as contexts and the weights that were trained on different ones.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import DamagedFile
from .files import (
    PACKAGE,
    checksums,
    damage,
    digest,
    expanded,
    read_json,
    remove_leftovers,
    replacing,
    runs_root,
    source_digest,
    write_json,
)
from .progress import log

Inputs = dict[str, Any]
ENTRY = "entry.json"
VERSION_PREFIX = "results version of "  # begins the name of the setting with the version of some code


def inputs_of(settings: Mapping[str, Any], digests: Mapping[str, Any], **before: Inputs) -> Inputs:
    """Return inputs as they would be read back from a JSON file, with lists instead of tuples."""
    inputs: Inputs = json.loads(json.dumps({"settings": settings, "digests": digests, "before": before}))
    return inputs


def code_inputs(name: str, version: int, *modules: str) -> Inputs:
    """Return the inputs that identify the code of a step or an entry.

    `version` is raised by hand when the code computes different numbers. In a git checkout, the code of
    `modules` counts, too, so that developers never see results of code that they have changed since.
    """
    is_checkout = (PACKAGE.parent / ".git").exists()
    digests = {f"code of {name}": source_digest(*modules)} if is_checkout else {}
    return inputs_of({VERSION_PREFIX + name: version}, digests)


def flat(inputs: Inputs) -> dict[str, Any]:
    """Return all settings and digests of inputs by name, with those of `before`. Digests begin with `#`."""
    values = {name: value for before in inputs["before"].values() for name, value in flat(before).items()}
    return values | inputs["settings"] | {f"#{name}": value for name, value in inputs["digests"].items()}


@dataclass(frozen=True)
class Record:
    """What a finished step or entry was made from, and what it has left.

    Attributes:
        uses: a digest of the files of each step and entry that was used, by name.
        files: size and checksum of each file, by its path in the folder.
        numbers: its part of the summary.
        metrics: its lines of metrics.jsonl.
        memory: memory snapshots that were taken meanwhile.
    """

    inputs: Inputs
    uses: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> "Record | None":
        """Read a record. Return None if the file is missing or damaged."""
        with suppress(DamagedFile, OSError, TypeError, AttributeError, LookupError):
            values = read_json(file)
            if values.pop("checksum") == digest(values):
                return cls(**values)
        return None

    def write(self, file: Path) -> "Record":
        """Write the record with its own checksum, and return it."""
        write_json(file, {"checksum": digest(asdict(self)), **asdict(self)})
        return self

    @property
    def output(self) -> str:
        """A digest of the files."""
        return digest(self.files)

    def damage(self, folder: Path, only_size: bool = False) -> str:
        """Describe the first file that is missing or damaged. Return "" if all files are intact.

        With `only_size`, the contents of the files are not read.
        """
        damages = (damage(folder / name, known, only_size) for name, known in self.files.items())
        return next(filter(None, damages), "")


@dataclass
class Work:
    """The argument of a function that computes a step or an entry.

    Attributes:
        folder: the folder to which the function writes its files.
        inputs: the inputs of what is computed.
        uses: digests of the files of each step and entry that is used.
        listen: called with each metric as soon as it is recorded.
        metrics, memory: what the record will contain.
    """

    folder: Path
    inputs: Inputs
    uses: dict[str, str] = field(default_factory=dict)
    listen: Callable[[dict[str, Any]], None] = lambda metric: None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)

    def add_metric(self, metric: dict[str, Any]) -> None:
        """Keep a metric for the record, and pass it on."""
        self.metrics.append({name: value for name, value in metric.items() if name != "replayed"})
        self.listen(metric)

    def record(self, numbers: dict[str, Any], files: Sequence[str]) -> Record:
        """Return the record of what was computed. Raises FileNotFoundError if one of its files is missing."""
        for name in files:
            (self.folder / name).stat()
        written = checksums(self.folder, files)
        return Record(self.inputs, self.uses, written, numbers, self.metrics, self.memory)


Compute = Callable[[Work], dict[str, Any]]  # writes files, and returns numbers for the summary


def store() -> Path:
    """Return the folder of the store: `$CTXKV_CACHE`, or `.cache` in the folder that contains all runs."""
    return expanded(os.environ.get("CTXKV_CACHE") or runs_root() / ".cache")


def entry_folder(kind: str, inputs: Inputs) -> Path:
    return store() / f"{kind}-{digest(inputs)}"


def intact_entry(kind: str, inputs: Inputs, uses: Mapping[str, str]) -> Record | None:
    """Return the record of an entry that is intact and was made from the files in `uses`, or None."""
    path = entry_folder(kind, inputs)
    record = Record.read(path / ENTRY)
    is_usable = record and record.inputs == inputs and record.uses == dict(uses)
    return record if record and is_usable and not record.damage(path) else None


def entry(
    kind: str,
    inputs: Inputs,
    compute: Compute,
    files: Sequence[str],
    uses: Mapping[str, str] | None = None,
    listen: Callable[[dict[str, Any]], None] = lambda metric: None,
) -> tuple[Path, Record]:
    """Return the folder and the record of an entry. It is computed first if it is missing or damaged.

    Args:
        compute: writes `files` into the folder of its argument.
        uses: digests of the files that the entry must have been made from.
        listen: called with the entry's metrics, which have `"replayed": True` if they are not new.
    """
    path, uses = entry_folder(kind, inputs), dict(uses or {})
    lock = path.with_name(f".{path.name}.lock")
    with wait_for_lock(lock, f"Another process computes {kind}; waiting for it."):
        if record := intact_entry(kind, inputs, uses):
            for metric in record.metrics:
                listen({**metric, "replayed": True})
            return path, record
        if path.exists():
            log(f"{path} is damaged, or was made from other files; it is computed again.")
        remove_leftovers(path.parent, f".{path.name}.*.part")
        with replacing(path) as folder:
            folder.mkdir()
            work = Work(folder, inputs, uses, listen)
            record = work.record(compute(work), files).write(folder / ENTRY)
    return path, record


@contextmanager
def wait_for_lock(file: Path, message: str) -> Iterator[None]:
    """Lock a file while the block runs. If another process has locked it, print the message and wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(file).acquire(timeout=0)
    except Timeout:
        log(message)
        lock = FileLock(file).acquire()
    with lock:
        yield
