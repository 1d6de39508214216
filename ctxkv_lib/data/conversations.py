"""Where the text comes from: UltraChat on the Hub, a local JSONL file, or pip-installed conversations.

Every source gives the same kind of rows, always in the same order. A smaller training set is the beginning of
a larger one; `validation` (chooses the best epoch), `test` (chooses nothing) and `corpus` (from which an
offline token table is made) do not depend on its size. The four never overlap.
"""

import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..config import DataConfig
from ..errors import UserError
from ..files import cache_dir, digest, replacing
from .hub import ULTRACHAT_SHARD, open_file, package_file

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

Split = Literal["train", "validation", "test", "corpus"]
Messages = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...]

# Rows of the shard. The published validation rows are the first 20 of theirs; the rest is room for more.
ULTRACHAT_VALIDATION = range(50_000, 50_500)
ULTRACHAT_TEST = range(50_500, 51_000)

# Rows in the order of `_chitchat_rows`. Fixed blocks, so that no setting moves the rows of another split.
CHITCHAT_VALIDATION = range(0, 50)
CHITCHAT_TEST = range(50, 100)
CHITCHAT_CORPUS = range(100, 1100)

_EMAIL = re.compile(r"\S@\S+\.\w")
_PHONE = re.compile(r"\d(?:[ ().-]{0,2}\d){6}")  # 7 digits or more, so some other long numbers, too
# Words that make up about 0.4 of running English, and less than 0.2 of the few chats in Spanish or nonsense.
_COMMON_WORDS = """
the a an and or but if i you he she it we they is are am was were be been to of in on for with that this have
has had do does did not no my your me so what how who when where yes can would will just about
"""
_ENGLISH = frozenset(_COMMON_WORDS.split())
_ENGLISH_SHARE = 0.2


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

    A .jsonl file has no test rows, if training leaves fewer lines of it than `data.test_samples`.

    Raises:
        UserError: more rows are asked for than there are, or the source is missing, damaged or unreachable.
    """
    source = {"ultrachat": _ultrachat, "jsonl": _jsonl, "chitchat": _chitchat}[data.source]
    origin = ULTRACHAT_SHARD.revision if data.source == "ultrachat" else data.source
    return _conversations(origin, source(data, split))


def read_jsonl(path: Path) -> Conversations:
    """Every conversation of a .jsonl or .jsonl.gz file.

    Raises:
        UserError: the file or one of its lines cannot be read.
    """
    rows = [(f"jsonl:{n}", _parse_line(f"{path}, line {n}", raw)) for n, raw in _jsonl_lines(path)]
    return _conversations("jsonl", rows)


def _conversations(origin: str, rows: list[tuple[str, Messages]]) -> Conversations:
    ids = tuple(name for name, _ in rows)
    messages = tuple(row for _, row in rows)
    return Conversations(ids, messages, digest([origin, ids, messages]))


def _first(available: range, data: DataConfig, split: Split, where: str) -> range:
    """The first rows of `available`, as many as `data` asks for."""
    name = "samples" if split == "train" else f"{split}_samples"
    wanted = getattr(data, name)
    if wanted > len(available):
        raise UserError(
            f"data.{name} is {wanted}, but {where} has only {len(available)} conversations for {split}; "
            f"lower data.{name} or use a larger source."
        )
    return available[:wanted]


def _ultrachat(data: DataConfig, split: Split) -> list[tuple[str, Messages]]:
    if split == "corpus":  # up to the end of the shard, which only the shard knows
        rows = range(ULTRACHAT_TEST.stop, ULTRACHAT_TEST.stop + data.corpus_samples)
    else:
        train, held_back = range(ULTRACHAT_VALIDATION.start), ULTRACHAT_VALIDATION
        available = {"train": train, "validation": held_back, "test": ULTRACHAT_TEST}[split]
        rows = _first(available, data, split, "UltraChat")
    copy, start = _local_copy(rows) or _fetch_copy(rows, data, split)
    contents = copy[rows.start - start : rows.stop - start]["messages"]
    return [(f"ultrachat:train_sft:{row}", content) for row, content in zip(rows, contents, strict=True)]


def _copies() -> Path:
    return cache_dir() / f"ultrachat-{ULTRACHAT_SHARD.revision[:12]}"


def _local_copy(rows: range) -> "tuple[Dataset, int] | None":
    """An Arrow copy that holds `rows`, and the row it starts at; None if no earlier run left one."""
    for folder in sorted(_copies().glob("rows-*")):
        _, start, stop = folder.name.split("-")
        if int(start) <= rows.start and rows.stop <= int(stop):
            return _open_copy(folder), int(start)
    return None


def _open_copy(folder: Path) -> "Dataset":
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is damaged ({type(error).__name__}); delete that folder and run again."
        ) from error


def _fetch_copy(rows: range, data: DataConfig, split: Split) -> "tuple[Dataset, int]":
    """Read the row groups that hold `rows` and keep them as an Arrow copy.

    `data.download=ranged` transfers the needed row groups' `messages` only. `whole` is slower (244 MB), but
    leaves the complete shard in huggingface_hub's cache.
    """
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

    with open_file(ULTRACHAT_SHARD, data.download) as stream:
        shard = ParquetFile(stream, pre_buffer=True)  # one request a row group, not one a column
        total = shard.metadata.num_rows
        if rows.stop > total:
            _first(range(ULTRACHAT_TEST.stop, total), data, split, "UltraChat's first shard")
        table, start = _read_groups(shard, rows)
    copy = Dataset(table)
    with replacing(_copies() / f"rows-{start}-{start + len(copy)}") as beside:
        copy.save_to_disk(str(beside))
    return copy, start


def _read_groups(shard: "ParquetFile", rows: range) -> tuple[Any, int]:
    """The `messages` of the row groups that overlap `rows` as a pyarrow Table, and the table's first row."""
    import pyarrow
    from tqdm import tqdm

    sizes = [shard.metadata.row_group(i).num_rows for i in range(shard.num_row_groups)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    wanted = [i for i, at in enumerate(starts) if at < rows.stop and at + sizes[i] > rows.start]
    progress = tqdm(wanted, desc="UltraChat", unit="group", disable=None)
    tables = [shard.read_row_group(i, columns=["messages"]) for i in progress]
    # The schema's metadata is the Hub's description of all columns, of which this is one.
    return pyarrow.concat_tables(tables).replace_schema_metadata(None), starts[wanted[0]]


def _jsonl(data: DataConfig, split: Split) -> list[tuple[str, Messages]]:
    path = Path(str(data.path))
    lines = _jsonl_lines(path)
    validation = range(max(0, len(lines) - data.validation_samples), len(lines))
    corpus = range(0)
    if split == "corpus" or data.table == "cooccurrence":
        corpus = range(max(0, validation.start - data.corpus_samples), validation.start)
    train = range(corpus.start if corpus else validation.start)
    test = train[data.samples :][-data.test_samples :] if data.test_samples else range(0)
    if split == "test" and len(test) < data.test_samples:
        return []
    available = {"train": train, "validation": validation, "test": test, "corpus": corpus}[split]
    where = f"{path} ({len(lines)} lines, {len(validation)} for validation, {len(corpus)} for the table)"
    rows = [lines[i] for i in _first(available, data, split, where)]
    return [(f"jsonl:{number}", _parse_line(f"{path}, line {number}", raw)) for number, raw in rows]


def _jsonl_lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    import gzip

    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            lines = [(number, raw) for number, raw in enumerate(file, start=1) if raw.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; set data.path to a .jsonl or .jsonl.gz file.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give a readable .jsonl or .jsonl.gz file."
        ) from error
    if not lines:
        raise UserError(f'{path} is blank; write one {{"messages": [...]}} a line.')
    return lines


def _parse_line(where: str, raw: bytes) -> Messages:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is not JSON ({error}); write one {{"messages": [...]}} a line.') from None
    if not isinstance(value, dict) or "messages" not in value:
        raise UserError(
            f'{where} has no "messages"; write {{"messages": [{{"role": ..., "content": ...}}]}}.'
        )
    return _checked_messages(where, value["messages"])


def _checked_messages(where: str, messages: Any) -> Messages:
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role", ""), str)
        for m in messages
    )
    if not valid:
        raise UserError(
            f'{where}: "messages" must be a list of {{"role": text, "content": text}}; correct the line.'
        )
    if not any(m["content"].strip() for m in messages):
        raise UserError(
            f"{where} is an empty conversation; give it at least one message with text, or delete it."
        )
    if any("\ud800" <= c <= "\udfff" for m in messages for c in m["content"]):
        raise UserError(
            f"{where} holds half of a surrogate pair, which no text can; write the whole character."
        )
    return [{"role": m.get("role", ""), "content": m["content"]} for m in messages]


def _chitchat(data: DataConfig, split: Split) -> list[tuple[str, Messages]]:
    rows = _chitchat_rows(package_file("chitchat_dataset", "dataset.json", "chitchat-dataset"))
    train = range(CHITCHAT_CORPUS.stop, len(rows))
    held_back = {"validation": CHITCHAT_VALIDATION, "test": CHITCHAT_TEST, "corpus": CHITCHAT_CORPUS}
    available = held_back.get(split, train)
    return [rows[i] for i in _first(available, data, split, "chitchat-dataset")]


@lru_cache(maxsize=1)  # a second of work, asked for once a split
def _chitchat_rows(path: Path) -> list[tuple[str, Messages]]:
    """English conversations of 4 messages or more without contact details, in the order of a hash."""
    with path.open(encoding="utf-8") as file:
        dataset = json.load(file)
    names = sorted(dataset, key=lambda name: hashlib.sha256(name.encode()).digest())
    long_enough = [(f"chitchat:{n}", _chitchat_messages(dataset[n]["messages"])) for n in names]
    return [(name, messages) for name, messages in long_enough if _is_usable(messages)]


def _chitchat_messages(turns: list[list[dict[str, str]]]) -> Messages:
    """A turn is what one sender wrote until the other answered: utterances, joined with a space."""
    first = turns[0][0]["sender"]
    joined = [(turn[0]["sender"], " ".join(u["text"].strip() for u in turn).strip()) for turn in turns]
    return [{"role": "user" if by == first else "assistant", "content": text} for by, text in joined if text]


def _is_usable(messages: Messages) -> bool:
    text = "\n".join(message["content"] for message in messages)
    if len(messages) < 4 or _EMAIL.search(text) or _PHONE.search(text):
        return False
    words = re.findall(r"[^\W\d]+", text.lower())
    return sum(word in _ENGLISH for word in words) >= _ENGLISH_SHARE * max(1, len(words))
