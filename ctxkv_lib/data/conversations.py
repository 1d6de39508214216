"""Where the text comes from: UltraChat on the Hub, a file of one's own, a package, or made up.

Every source gives the same kind of rows, always in the same order. A smaller training set is the beginning of
a larger one; `validation` (chooses the best epoch), `test` (chooses nothing) and `corpus` (from which an
offline token table is made) do not depend on its size. The four never overlap; except that with
`data.corpus=chitchat+own` the training text of a file of one's own helps to make its table.
"""

from dataclasses import dataclass
from pathlib import Path

from ..config import DataConfig
from ..files import digest
from .chitchat import chitchat_rows
from .formats import read_rows
from .hub import ULTRACHAT_SHARD
from .local_files import file_rows
from .recall import recall_rows
from .rows import Messages, Row, Split
from .ultrachat import ultrachat_rows


@dataclass(frozen=True)
class Conversations:
    """Rows of one split, in order.

    Attributes:
        ids: a stable name a row: "ultrachat:train_sft:50000", "chitchat:<uuid>", "jsonl:<line number>".
        messages: one list of `{"role": ..., "content": ...}` a row.
        fingerprint: changes when the source, an id or a content does.
    """

    ids: tuple[str, ...]
    messages: tuple[Messages, ...]
    fingerprint: str

    def texts(self) -> list[str]:
        """Each conversation's contents, joined with one newline; no roles."""
        return ["\n".join(message["content"] for message in row) for row in self.messages]


def load_conversations(data: DataConfig, split: Split) -> Conversations:
    """The rows of `split` (`data.samples`, `data.validation_samples` and so on, of them).

    Raises:
        UserError: more rows are asked for than there are, or the source is missing, damaged or unreachable.
    """
    origin = ULTRACHAT_SHARD.revision if data.source == "ultrachat" else data.source
    sources = {
        "ultrachat": ultrachat_rows,
        "file": file_rows,
        "chitchat": chitchat_rows,
        "recall": recall_rows,
    }
    source = sources[data.source]
    left_out = split == "test" and data.test_samples == 0
    return _conversations(origin, [] if left_out else source(data, split))


def read_conversations(path: Path) -> Conversations:
    """Every conversation of a file of one's own (`formats` says of which kinds).

    Raises:
        UserError: the file or one of its conversations cannot be read.
    """
    return _conversations("file", read_rows(path))


def _conversations(origin: str, rows: list[Row]) -> Conversations:
    ids = tuple(name for name, _ in rows)
    messages = tuple(row for _, row in rows)
    return Conversations(ids, messages, digest([origin, ids, messages]))
