"""Conversations from their sources: UltraChat on the Hub, a file, or a package.

Every source gives rows in one order. A smaller training set is the beginning of a larger one. The other
splits do not depend on its size: `validation` chooses the best epoch, `test` chooses nothing, and a token
table is made from `corpus`. The four overlap only with `data.corpus=chitchat+own`: a file's training text is
part of the corpus.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from ..files import digest_of_lists
from .chitchat import chitchat_rows
from .hub import ULTRACHAT_REVISION
from .local_files import file_rows, kept_file
from .rows import Rows, Split
from .settings import DataConfig
from .ultrachat import row_numbers, ultrachat_rows

READERS: dict[str, Callable[[DataConfig, Split], Rows]] = {
    "ultrachat": ultrachat_rows,
    "file": file_rows,
    "chitchat": chitchat_rows,
}


@dataclass(frozen=True)
class Conversations:
    """Rows of one split, in order.

    Attributes:
        rows: an id and messages each, read in chunks. The id is a stable name, such as
            "ultrachat:train_sft:50000" or "jsonl:<line number>".
        fingerprint: changes when the source, an id or a content does.
    """

    rows: Rows = field(compare=False)
    fingerprint: str

    @classmethod
    def of(cls, origin: str, rows: Rows) -> "Conversations":
        """Read all rows for the fingerprint, the digest of [origin, ids, messages]."""
        ids, messages = (name for name, _ in rows), (row for _, row in rows)
        return cls(rows, digest_of_lists(origin, ids, messages))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids, in memory."""
        return tuple(name for name, _ in self.rows)

    def texts(self) -> Iterator[str]:
        """Read the text of each conversation: its contents joined with one newline, no roles."""
        return ("\n".join(message["content"] for message in messages) for _, messages in self.rows)


def load_conversations(data: DataConfig, split: Split) -> Conversations:
    """Read a split: `data.samples`, `data.validation_samples` and so on rows of the source.

    Raises:
        UserError: more rows are asked for than there are, or the source is missing, damaged or unreachable.
    """
    origin = ULTRACHAT_REVISION if data.source == "ultrachat" else data.source
    return Conversations.of(origin, READERS[data.source](data, split))


def check_splits(data: DataConfig) -> None:
    """Raise the UserErrors of `load_conversations` that can be found without a network."""
    check = row_numbers if data.source == "ultrachat" else READERS[data.source]
    for split in get_args(Split):
        if split != "corpus" or data.reads_corpus:
            check(data, split)


def read_conversations(path: Path, columns: str | None = None) -> Conversations:
    """Read every conversation of a file, as `read_rows` does."""
    return Conversations.of("file", kept_file(path, columns))
