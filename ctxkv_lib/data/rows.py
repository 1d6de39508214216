"""Rows of conversations, read in chunks, and their copies in the shared cache."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import DamagedFile, UserError
from ..files import checksum, read_sealed_json, replacing, state, write_sealed_json
from .settings import DataConfig

Split = Literal["train", "validation", "test", "corpus"]
Messages = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...]
Row = tuple[str, Messages]  # a stable name, and the conversation

PIECE_ROWS = 1000  # rows in memory at a time
ARROW = "rows.arrow"
CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Rows:
    """Rows in order, read again each time they are iterated, `PIECE_ROWS` at a time.

    Attributes:
        parts: numbers of rows, and the function that reads a range of them.
    """

    parts: tuple[tuple[range, Callable[[range], list[Row]]], ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part, _ in self.parts)

    def __iter__(self) -> Iterator[Row]:
        for part, read in self.parts:
            for at in range(0, len(part), PIECE_ROWS):
                yield from read(part[at : at + PIECE_ROWS])

    def __add__(self, others: "Rows") -> "Rows":
        return Rows((*self.parts, *others.parts))

    def __getitem__(self, wanted: slice) -> "Rows":
        """Select the rows `start:stop`."""
        start, stop, _ = wanted.indices(len(self))
        taken = []
        for part, read in self.parts:
            if inside := part[max(start, 0) : max(stop, 0)]:
                taken.append((inside, read))
            start, stop = start - len(part), stop - len(part)
        return Rows(tuple(taken))


def rows_asked(data: DataConfig, split: Split, available: int, source: str) -> int:
    """Return how many rows of a split are asked for; a UserError if there are fewer."""
    name = "samples" if split == "train" else f"{split}_samples"
    asked: int = getattr(data, name)
    if asked > available:
        raise UserError(
            f"data.{name} is {asked}, but {source} has only {available} conversations for {split}; "
            f"lower data.{name} or use a larger source."
        )
    return asked


def keep_rows(folder: Path, key: str, rows: Iterable[Row]) -> None:
    """Write rows as an Arrow file of `datasets` with its checksum beside, for `kept_rows`."""
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    text = Value("large_string")  # a batch of rows may have more than 2 GiB
    columns = Features({"name": text, "messages": [{"role": text, "content": text}]})
    with replacing(folder) as beside:
        beside.mkdir()
        with ArrowWriter(features=columns, path=str(beside / ARROW), writer_batch_size=PIECE_ROWS) as writer:
            for name, messages in rows:
                writer.write({"name": name, "messages": messages})
            writer.finalize()
        write_sealed_json(beside / CHECKSUMS, {"key": key, ARROW: checksum(beside / ARROW)})


def kept_rows(folder: Path, key: str) -> Rows:
    """Open what `keep_rows` wrote; rows are read when they are iterated.

    Raises:
        DamagedFile: it is damaged, or has another key.
        FileNotFoundError: it is missing.
    """
    from datasets import Dataset

    kept = read_sealed_json(folder / CHECKSUMS)
    if kept.get("key") != key or state(folder / ARROW, kept.get(ARROW, "")) != "intact":
        raise DamagedFile(folder, f"{ARROW} is not what was written")
    dataset = Dataset.from_file(str(folder / ARROW))

    def read(part: range) -> list[Row]:
        columns = dataset[part.start : part.stop]
        return list(zip(columns["name"], columns["messages"], strict=True))

    return Rows(((range(len(dataset)), read),))
