"""Where the text comes from: UltraChat on the Hub, a file of one's own, or pip-installed conversations.

Every source gives the same kind of rows, always in the same order. A smaller training set is the beginning of
a larger one; `validation` and `corpus` (from which an offline token table is made) do not depend on its size.
The three never overlap.
"""

from dataclasses import dataclass
from pathlib import Path

from ..config import DataConfig
from ..files import digest
from .chitchat import chitchat_rows
from .hub import ULTRACHAT_SHARD
from .local_files import jsonl_rows, read_rows
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
    """The rows of `split` (`data.samples`, `data.validation_samples` or `data.corpus_samples` of them).

    Raises:
        UserError: more rows are asked for than there are, or the source is missing, damaged or unreachable.
    """
    source = {"ultrachat": ultrachat_rows, "jsonl": jsonl_rows, "chitchat": chitchat_rows}[data.source]
    origin = ULTRACHAT_SHARD.revision if data.source == "ultrachat" else data.source
    return _conversations(origin, source(data, split))


def read_jsonl(path: Path) -> Conversations:
    """Every conversation of a .jsonl or .jsonl.gz file.

    Raises:
        UserError: the file or one of its lines cannot be read.
    """
    return _conversations("jsonl", read_rows(path))


def _conversations(origin: str, rows: list[Row]) -> Conversations:
    ids = tuple(name for name, _ in rows)
    messages = tuple(row for _, row in rows)
    return Conversations(ids, messages, digest([origin, ids, messages]))
