"""Rows of conversations, read piece by piece, and their copies in the shared cache."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import DamagedFile, UserError
from ..files import checksum, read_sealed_json, replacing, state, write_sealed_json

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "validation", "test", "corpus"]
Messages = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...]
Row = tuple[str, Messages]  # a stable name, and the conversation

PIECE_ROWS = 1000  # rows in memory at a time
ARROW = "rows.arrow"
CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Rows:
    """Rows in order, read again each time they are iterated.

    Attributes:
        pieces: how many rows each piece has, and the function that reads them.
    """

    pieces: tuple[tuple[int, Callable[[], list[Row]]], ...]

    @classmethod
    def held(cls, rows: list[Row]) -> "Rows":
        """Wrap rows that are in memory anyway."""
        return cls(((len(rows), lambda: rows),))

    def __len__(self) -> int:
        return sum(count for count, _ in self.pieces)

    def __iter__(self) -> Iterator[Row]:
        for _, read in self.pieces:
            yield from read()

    def __reversed__(self) -> Iterator[Row]:
        for _, read in reversed(self.pieces):
            yield from reversed(read())

    def __add__(self, others: "Rows") -> "Rows":
        return Rows((*self.pieces, *others.pieces))

    def __getitem__(self, wanted: slice) -> "Rows":
        """Select the rows `start:stop`."""
        start, stop, _ = wanted.indices(len(self))
        taken = []
        for count, read in self.pieces:
            part = range(count)[max(start, 0) : max(stop, 0)]
            if part:
                taken.append((len(part), partial(_part, read, part)))
            start, stop = start - count, stop - count
        return Rows(tuple(taken))


def _part(read: Callable[[], list[Row]], part: range) -> list[Row]:
    return read()[part.start : part.stop]


def text_of(messages: Messages) -> str:
    """Join a conversation's contents with one newline; no roles."""
    return "\n".join(message["content"] for message in messages)


def check_available(asked: int, available: int, split: Split, source: str) -> None:
    """Refuse to read more rows of a split than there are.

    Raises:
        UserError: `asked` is more than `available`.
    """
    if asked > available:
        name = "data.samples" if split == "train" else f"data.{split}_samples"
        raise UserError(
            f"{name} is {asked}, but {source} has only {available} conversations for {split}; "
            f"lower {name} or use a larger source."
        )


def keep_rows(folder: Path, key: str, rows: Iterable[Row]) -> None:
    """Write rows as an Arrow file of `datasets` with its checksum beside, for `kept_rows`."""
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    text = Value("string")
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
        DamagedFile: it is not what was written with that key.
        FileNotFoundError: there is none.
    """
    from datasets import Dataset

    kept = read_sealed_json(folder / CHECKSUMS)
    if kept.get("key") != key or state(folder / ARROW, kept.get(ARROW, "")) != "intact":
        raise DamagedFile(folder, f"{ARROW} is not what was written")
    rows = Dataset.from_file(str(folder / ARROW))
    begins = range(0, len(rows), PIECE_ROWS)
    pieces = [range(begin, min(begin + PIECE_ROWS, len(rows))) for begin in begins]
    return Rows(tuple((len(piece), partial(_read_piece, rows, piece)) for piece in pieces))


def _read_piece(rows: "Dataset", piece: range) -> list[Row]:
    columns = rows[piece.start : piece.stop]
    return list(zip(columns["name"], columns["messages"], strict=True))
