"""What every source of conversations gives: named rows, one piece of them in memory at a time.

Rows of large sources are kept in the shared cache as Arrow copies, a folder `rows-START-STOP` for each piece.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import DamagedFile, UserError
from ..files import checksum, read_sealed_json, replacing, state, write_sealed_json
from ..runs.config import DataConfig

if TYPE_CHECKING:
    from pyarrow import Table

Split = Literal["train", "validation", "test", "corpus"]
Messages = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...]
Row = tuple[str, Messages]  # a stable name, and the conversation

ARROW = "rows.arrow"
CHECKSUMS = "checksums.json"  # of the files of a piece, beside them
COLUMNS = ("id", "messages")


@dataclass(frozen=True)
class Rows:
    """Rows in order, read anew each time they are looked at.

    Attributes:
        pieces: how many rows each piece has, and what reads them.
    """

    pieces: tuple[tuple[int, Callable[[], list[Row]]], ...]

    @classmethod
    def held(cls, rows: list[Row]) -> "Rows":
        """Rows that are in memory anyway."""
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
        """The rows `start:stop`."""
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
    """A conversation's contents, joined with one newline; no roles."""
    return "\n".join(message["content"] for message in messages)


def asked_rows(available: int, data: DataConfig, split: Split, where: str) -> int:
    """How many rows `data` asks for, which must not be more than there are."""
    name = "samples" if split == "train" else f"{split}_samples"
    wanted: int = getattr(data, name)
    if wanted > available:
        raise UserError(
            f"data.{name} is {wanted}, but {where} has only {available} conversations for {split}; "
            f"lower data.{name} or use a larger source."
        )
    return wanted


def keep_rows(folder: Path, start: int, names: list[str], messages: "Table") -> None:
    """Leave a piece of a source in `folder`.

    Args:
        start: the number of its first row.
        messages: the column `messages`, a row for each of `names`.
    """
    from datasets.arrow_writer import ArrowWriter

    # The schema's metadata is the Hub's description of all columns, of which this is one.
    table = messages.add_column(0, "id", [names]).replace_schema_metadata(None)
    place = f"rows-{start}-{start + len(names)}"
    with replacing(folder / place) as beside:
        beside.mkdir()
        with ArrowWriter(path=str(beside / ARROW)) as writer:
            writer.write_table(table)
            writer.finalize()
        write_sealed_json(beside / CHECKSUMS, {"rows": place, ARROW: checksum(beside / ARROW)})


def kept_rows(folder: Path, wanted: range) -> Rows:
    """The rows `wanted` of a source, from the pieces in `folder`.

    Raises:
        DamagedFile: a piece is not what `keep_rows` wrote.
        FileNotFoundError: not all of them are there.
    """
    pieces = {range(*map(int, path.name.split("-")[1:])): path for path in folder.glob("rows-*")}
    taken, at = [], wanted.start
    while at < wanted.stop:
        rows = next((rows for rows in pieces if at in rows), None)
        if rows is None:
            raise FileNotFoundError(folder)
        _check_piece(pieces[rows])
        part = range(at - rows.start, min(rows.stop, wanted.stop) - rows.start)
        taken.append((len(part), partial(_read_piece, pieces[rows], part)))
        at = rows.stop
    return Rows(tuple(taken))


def _check_piece(path: Path) -> None:
    try:
        kept = read_sealed_json(path / CHECKSUMS)
    except (DamagedFile, FileNotFoundError):
        raise DamagedFile(path, "its checksums are missing or damaged") from None
    if kept.get("rows") != path.name or state(path / ARROW, kept.get(ARROW, "")) != "intact":
        raise DamagedFile(path, f"{ARROW} is not what was written")


def _read_piece(path: Path, part: range) -> list[Row]:
    from datasets import Dataset

    columns = Dataset.from_file(str(path / ARROW))[part.start : part.stop]
    return list(zip(*(columns[name] for name in COLUMNS), strict=True))
