"""Where the text comes from: UltraChat on the Hub, a file of one's own, a package, or made up.

Every source gives the same kind of rows, always in the same order. A smaller training set is the beginning of
a larger one; `validation` (chooses the best epoch), `test` (chooses nothing) and `corpus` (from which an
offline token table is made) do not depend on its size. The four never overlap; except that with
`data.corpus=chitchat+own` the training text of a file of one's own helps to make its table.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..files import digest_of_lists
from ..runs.config import DataConfig
from .chitchat import chitchat_rows
from .hub import ULTRACHAT_REVISION
from .local_files import file_rows, kept_file
from .recall import recall_rows
from .rows import Messages, Rows, Split, text_of
from .ultrachat import ultrachat_rows


@dataclass(frozen=True)
class Conversations:
    """Rows of one split, in order.

    Attributes:
        rows: (id, messages) a row, read piece by piece. The id is a stable name:
            "ultrachat:train_sft:50000", "chitchat:<uuid>", "jsonl:<line number>".
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

    @property
    def messages(self) -> tuple[Messages, ...]:
        """All conversations, in memory: a list of `{"role": ..., "content": ...}` each."""
        return tuple(messages for _, messages in self.rows)

    def texts(self) -> Iterator[str]:
        """The text of each conversation."""
        return (text_of(messages) for _, messages in self.rows)


def load_conversations(data: DataConfig, split: Split) -> Conversations:
    """The rows of `split` (`data.samples`, `data.validation_samples` and so on, of them).

    Raises:
        UserError: more rows are asked for than there are, or the source is missing, damaged or unreachable.
    """
    origin = ULTRACHAT_REVISION if data.source == "ultrachat" else data.source
    sources = {
        "ultrachat": ultrachat_rows,
        "file": file_rows,
        "chitchat": chitchat_rows,
        "recall": recall_rows,
    }
    source = sources[data.source]
    left_out = split == "test" and data.test_samples == 0
    return Conversations.of(origin, Rows(()) if left_out else source(data, split))


def read_conversations(path: Path) -> Conversations:
    """Every conversation of a file of one's own (`formats` says of which kinds).

    Raises:
        UserError: the file or one of its conversations cannot be read.
    """
    return Conversations.of("file", kept_file(path))
