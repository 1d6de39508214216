"""Rows of conversations, read piece by piece, and their copies in the shared cache."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import UserError
from ..files import read_tensors, write_streamed

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "validation", "test", "corpus"]
Messages = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...]
Row = tuple[str, Messages]  # a stable name, and the conversation

PIECE_ROWS = 1000  # rows in memory at a time


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


def keep_rows(path: Path, key: str, rows: Iterable[Row]) -> None:
    """Write rows to a safetensors file, which `kept_rows` reads piece by piece.

    Tensor `text` (uint8) holds each piece as a JSON list, filled up to a multiple of 8 bytes with blanks.
    `pieces` (int64 `[n, 2]`) holds the number of rows and of bytes of each piece.
    """
    from torch import frombuffer, tensor, uint8

    remaining, pieces = iter(rows), []

    def tensors() -> Iterator[tuple[str, "Tensor"]]:
        while piece := list(islice(remaining, PIECE_ROWS)):
            text = json.dumps(piece, ensure_ascii=False).encode()
            filled = bytearray(text.ljust(-(-len(text) // 8) * 8))
            pieces.append((len(piece), len(filled)))
            yield "text", frombuffer(filled, dtype=uint8)
        yield "pieces", tensor(pieces).view(-1, 2)

    write_streamed(path, tensors(), {"key": key})


def kept_rows(path: Path, key: str) -> Rows:
    """Open what `keep_rows` wrote; rows are read when they are iterated.

    Raises:
        DamagedFile: it is not what was written with that key.
        FileNotFoundError: there is none.
    """
    pieces, begin = [], 0
    for count, size in read_tensors(path, key)["pieces"].tolist():
        pieces.append((count, partial(_read_piece, path, begin, begin + size)))
        begin += size
    return Rows(tuple(pieces))


def _read_piece(path: Path, begin: int, end: int) -> list[Row]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as kept:
        text = kept.get_slice("text")[begin:end].numpy().tobytes()
    return [(name, messages) for name, messages in json.loads(text)]
