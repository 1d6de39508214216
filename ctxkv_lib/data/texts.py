"""Read the user's own conversations from a file, a folder of files, or a data set on the Hub."""

import gzip
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from ..files import visible_files
from ..progress import status_line
from .hub import dataset_files

# Pairs of a record's place in its file, such as "line 3", and the record itself.
Records = Iterator[tuple[str, Any]]

# Names of the field with the list of messages: OpenAI uses the first name, and ShareGPT uses the second.
CHATS = ("messages", "conversations")
# Fields of a conversation in a user's export from ChatGPT and from Claude.
CHATGPT, CLAUDE = ("mapping", "current_node"), ("chat_messages",)
# The known forms of a record, each as a list of fields. The first form whose fields are all present is used.
FORMS: tuple[tuple[str, ...], ...] = (
    *((name,) for name in CHATS),
    CHATGPT,
    CLAUDE,
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("text",),
)
ALLOWED = "; ".join(" and ".join(form) for form in FORMS)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # owner/name, or owner/name:configuration


def read_texts(source: str | Path, split: str | None = None) -> list[str]:
    """Read the text of each conversation, in order. Callers share the list and must not change it.

    `source` is a file, a folder, or a data set on the Hub. The files of a folder are read in the order of
    their paths. `split` is for a data set on the Hub: if it is None, the data set's only split is read, or
    train if there are several splits. Raises a UserError if there is nothing to read. If a record is not a
    conversation, the error names the file and the place of the record.
    """
    path = Path(os.path.expanduser(source))
    if not path.exists() and _kind(path) not in FILE_READERS and HUB_NAME.fullmatch(str(source)):
        files = dataset_files(str(source), split)
    elif split is not None:
        raise UserError(f"data.split is {split!r}; allowed: None, unless the data is a data set on the Hub.")
    elif not path.exists():
        known = f"a file ({KINDS}), a folder of such files, or a data set on the Hub as owner/name"
        raise UserError(f"{path.absolute()} does not exist; name {known}.")
    elif path.is_file():
        files = [path]
    else:
        files = sorted(file for file in visible_files(path) if _kind(file) in FILE_READERS)
    states = [file.stat() for file in files]
    with status_line(f"Reading {source}"):
        texts = _read(tuple(files), *((state.st_mtime_ns, state.st_size) for state in states))
    if not texts:
        raise UserError(f"{source} has no conversations; write at least one ({KINDS}).")
    return texts


# Keep the texts in memory, since every split is read from them.
@lru_cache(maxsize=1)
def _read(files: tuple[Path, ...], *_: tuple[int, int]) -> list[str]:
    """Return the texts of all files. The other arguments are the files' times and sizes."""
    texts: list[str] = []
    for file in files:
        if _kind(file) not in FILE_READERS:
            raise UserError(f"{file} has an unknown file type; allowed: {KINDS}.")
        records = FILE_READERS[_kind(file)](file)
        try:
            texts += filter(None, (text_of(f"{file}, {place}", record) for place, record in records))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file} cannot be read ({error}); name a readable file.") from error
    return texts


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _lines(path: Path) -> Iterator[str]:
    """Decode a file line by line, so that errors can name the line. A byte order mark is dropped."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number} is not UTF-8 ({error}); save it as UTF-8.") from None


def _json(path: Path) -> Records:
    """Read records from a JSON file: either one array of records, or one record per line."""
    if next(filter(str.strip, _lines(path)), "").lstrip().startswith("["):
        yield from ((f"item {n}", record) for n, record in enumerate(_parsed(path, "".join(_lines(path))), 1))
        return
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield f"line {number}", _parsed(path, line.strip(), number)


def _parsed(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{path}, line {first_line + getattr(error, 'lineno', 1) - 1}"
        reason = getattr(error, "msg", error)
        raise UserError(f"{where} is not JSON ({reason}); write one record per line, or one array.") from None


def _table(path: Path) -> Records:
    """Read records from a CSV or TSV file. The first line is a header, in upper or lower case.

    In CSV, the separator is whichever of `,`, `;` and tab is most frequent in the header.
    """
    import pandas as pd

    header = next(_lines(path), "")
    separator = "\t" if _kind(path) == ".tsv" else max(",;\t", key=header.count)
    options: dict[str, Any] = {"sep": separator, "dtype": str, "keep_default_na": False, "index_col": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row has more cells than the header
            frame = pd.read_csv(path, encoding="utf-8-sig", **options)
    except (ValueError, pd.errors.ParserWarning) as error:
        raise UserError(
            f"{path} cannot be read as CSV ({one_line(str(error))}); give each row as many cells as the "
            "header, and put quotes around cells that contain the separator."
        ) from None
    frame.columns = frame.columns.str.lower()  # spreadsheets may capitalize the names of fields
    yield from ((f"row {number}", record) for number, record in enumerate(frame.to_dict("records"), start=1))


def _parquet(path: Path) -> Records:
    from pyarrow import ArrowException, parquet

    try:
        fields = _form(str(path), parquet.read_schema(path).names)
        records = parquet.read_table(path, columns=[*fields]).to_pylist()
    except (ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}); write it again.") from None
    yield from ((f"row {number}", record) for number, record in enumerate(records, start=1))


def _plain(path: Path) -> Records:
    """Read conversations from a text file. Blank lines separate the conversations."""
    lines = (line.replace("\r\n", "\n") for line in _lines(path))
    groups = groupby(lines, key=lambda line: bool(line.strip()))
    blocks = ("".join(group).strip() for has_text, group in groups if has_text)
    return ((f"block {n}", {"text": block}) for n, block in enumerate(blocks, start=1))


FILE_READERS: dict[str, Callable[[Path], Records]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json),
    **dict.fromkeys((".csv", ".tsv"), _table),
    ".txt": _plain,
    ".parquet": _parquet,
}
KINDS = f"{', '.join(FILE_READERS)}, all but .parquet also as .gz"


def _form(where: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the form of a record with the fields `names`. Raises a UserError if the form is unknown."""
    fields = [*names]
    if form := next((form for form in FORMS if {*form} <= {*fields}), None):
        return form
    has = f"the fields {', '.join(map(str, fields[:8]))}" if fields else "no fields"
    raise UserError(f"{where} has {one_line(has)}; allowed: {ALLOWED}. Rename them.")


def text_of(where: str, record: Any) -> str:
    """Join the messages of a record into one text, without roles.

    Raises a UserError if the record has no known form, or if the conversation is empty. The error names the
    record's place, `where`. If an export from ChatGPT or Claude has an empty conversation, the result is an
    empty text instead, since users cannot edit exports.
    """
    if not isinstance(record, dict):
        raise UserError(f'{where} is not a record; write an object with fields, like {{"messages": [...]}}.')
    form = _form(where, record)
    try:
        text = "\n".join(_messages(record, form))
        text.encode()
    except (AttributeError, KeyError, TypeError, UnicodeEncodeError) as error:
        expected = f"{' and '.join(form)} must be {EXPECTED.get(form[0], 'text')}"
        raise UserError(f"{where}: {expected} ({type(error).__name__}: {error}); correct it.") from None
    if text.strip():
        return text
    if form in (CHATGPT, CLAUDE):
        return ""
    raise UserError(f"{where} is an empty conversation; write a text, or delete it.")


EXPECTED = {
    **dict.fromkeys(CHATS, 'a list of {"role": text, "content": text} or {"from": text, "value": text}'),
    CHATGPT[0]: "as ChatGPT exports them",
    CLAUDE[0]: "as Claude exports them",
}


def _messages(record: dict[str, Any], form: tuple[str, ...]) -> Iterator[str]:
    """Yield the messages of a record with this form. The caller checks that the messages are texts."""
    if form == CHATGPT:
        yield from filter(None, _texts(map(_shown, _path_to_current(record))))
    elif form == CLAUDE:
        turns = record["chat_messages"]
        yield from filter(None, _texts(turn.get("content") or turn["text"] for turn in turns))
    elif form[0] in CHATS:
        turns = record[form[0]]
        yield from _texts(turn["value" if turn.get("content") is None else "content"] for turn in turns)
    else:
        yield from (record[name] for name in form if record[name] or name != "input")


def _texts(contents: Iterable[Any]) -> Iterator[Any]:
    """Yield the text of each message. If a message has several parts, join the texts and skip images."""
    for content in contents:
        if not isinstance(content, list):
            yield content
            continue
        texts = [part if isinstance(part, str) else part.get("text") for part in content]
        if any(texts):
            yield "\n".join(text for text in texts if text)


def _path_to_current(record: dict[str, Any]) -> list[Any]:
    """List the messages of a ChatGPT conversation from the root to `current_node`, in order."""
    nodes, messages, name = dict(record["mapping"]), [], record["current_node"]
    while name is not None:
        # Remove each node that is read, so that a cycle raises a KeyError.
        node = nodes.pop(name)
        messages.append(node.get("message"))
        name = node.get("parent")
    return messages[::-1]


def _shown(message: dict[str, Any] | None) -> list[Any]:
    """Return the parts of a message, or an empty list if ChatGPT does not show the message."""
    if message is None or message["author"]["role"] not in ("user", "assistant"):
        return []
    is_hidden = (message.get("metadata") or {}).get("is_visually_hidden_from_conversation")
    is_call = message.get("recipient") not in (None, "all")  # the message calls a tool
    return [] if is_hidden or is_call else message["content"].get("parts") or []
