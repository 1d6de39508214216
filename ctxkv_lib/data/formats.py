"""Files of conversations as people have them: JSONL, JSON, CSV, TSV, Parquet and plain text.

Records are recognised one by one, by the names of their fields (`RECOGNISED`); the first that cannot be
taken is named by file and line, or row.
"""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .rows import Messages, Row

Record = dict[str, Any]
Records = Iterator[tuple[str, Any]]  # where it stands ("line 3"), and what stands there

FILES = ".jsonl, .json, .csv, .tsv, .txt (each also as .gz) or .parquet"
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")


def read_rows(path: Path) -> list[Row]:
    """Every conversation of a file, named by what it is and where it stands in it ("jsonl:3").

    Raises:
        UserError: the file or one of its records cannot be read.
    """
    path = Path(os.path.expanduser(path))  # Path.expanduser raises where there is no such user
    if not path.exists():
        raise UserError(f"{path} does not exist; name a {FILES} file.")
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "").lower()
    if kind not in READERS:
        raise UserError(f"{path} is of no known kind; allowed: {FILES}.")
    rows = [
        (f"{kind[1:]}:{place.split()[-1]}", _messages(f"{path}, {place}", value))
        for place, value in READERS[kind](path)
    ]
    if not rows:
        raise UserError(f"{path} is blank; give a file with at least one conversation.")
    return rows


# From a file to records


def _content(path: Path) -> bytes:
    try:
        return (gzip.open(path) if path.suffix == ".gz" else path.open("rb")).read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); name a readable {FILES} file.") from error


def _decoded(where: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from None


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); write one conversation a line.") from None


def _json_lines(path: Path) -> Records:
    for number, raw in enumerate(io.BytesIO(_content(path)), start=1):
        if raw.strip():
            where = f"{path}, line {number}"
            yield f"line {number}", _parsed(where, _decoded(where, raw))


def _json(path: Path) -> Records:
    """One array of conversations; else JSON lines under another name."""
    if not _content(path).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_lines(path)
        return
    values = _parsed(str(path), _decoded(str(path), _content(path)))
    yield from ((f"item {number}", value) for number, value in enumerate(values, start=1))


def _table(path: Path) -> Records:
    """CSV or TSV with a line of names at the top; the separator is the one that this line has most of."""
    text = _decoded(str(path), _content(path))
    names = text.partition("\n")[0]
    csv.field_size_limit(len(text) + 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=names.count))
    try:
        for record in reader:
            yield f"line {reader.line_num}", record
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not CSV ({error}); correct the line.") from None


def _parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    _content(path)  # a missing or unreadable file is named as every other
    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}); write it again.") from error
    yield from ((f"row {number}", record) for number, record in enumerate(records, start=1))


def _blocks(path: Path) -> Records:
    """Plain text: what stands between blank lines is one conversation."""
    text = _decoded(str(path), _content(path)).replace("\r\n", "\n").strip()
    blocks = _BLANK_LINES.split(text) if text else []
    yield from ((f"block {number}", {"text": block}) for number, block in enumerate(blocks, start=1))


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".txt": _blocks,
}


# From a record to messages


def _chat(turns: Any, role: str, content: str) -> Messages:
    """Turns of OpenAI's or ShareGPT's form. Raises TypeError or KeyError where they are not."""
    messages = []
    for turn in turns:
        parts = turn[content] or ""  # null: a message that only calls a tool
        if not isinstance(parts, str):
            parts = "".join(part["text"] for part in parts if part.get("type", "text") == "text")
        name = turn.get(role, "")
        messages.append({"role": ROLES.get(name, name) + "", "content": parts})
    return messages


def _pair(*names: str) -> Callable[[Record], Messages]:
    """A question in one or more fields, of which some may be empty, and the answer in the last."""

    def read(record: Record) -> Messages:
        question = "\n".join(part for name in names[:-1] if (part := record.get(name)))
        answer = record[names[-1]] + ""  # whatever is no text is a TypeError
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    return read


def _single(name: str) -> Callable[[Record], Messages]:
    return lambda record: [{"role": "", "content": record[name] + ""}]


# The fields that a record must have, and how they are read; the first that fits is taken.
RECOGNISED: dict[tuple[str, ...], Callable[[Record], Messages]] = {
    ("messages",): lambda record: _chat(record["messages"], "role", "content"),  # OpenAI, UltraChat
    ("conversations",): lambda record: _chat(record["conversations"], "from", "value"),  # ShareGPT
    ("instruction", "output"): _pair("instruction", "input", "output"),  # Alpaca
    ("prompt", "completion"): _pair("prompt", "completion"),
    ("question", "answer"): _pair("question", "answer"),
    ("text",): _single("text"),
    ("content",): _single("content"),
}
KNOWN = "; ".join(" and ".join(names) for names in RECOGNISED)


def _messages(where: str, record: Any) -> Messages:
    found = list(record) if isinstance(record, dict) else []
    fields = next((names for names in RECOGNISED if set(names) <= set(found)), None)
    if fields is None:
        has = f"the fields {', '.join(map(str, found[:8]))}" if found else "no fields"
        raise UserError(f"{where} has {has}; allowed: {KNOWN}.")
    try:
        messages = RECOGNISED[fields](record)
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{where}: {_FORMS.get(fields[0], _TEXTS)}; correct it.") from None
    if not any(message["content"].strip() for message in messages):
        raise UserError(
            f"{where} is an empty conversation; give it at least one message with text, or delete it."
        )
    if any("\ud800" <= c <= "\udfff" for message in messages for c in message["content"]):
        raise UserError(
            f"{where} holds half of a surrogate pair, which no text can; write the whole character."
        )
    return messages


_FORMS = {
    "messages": '"messages" must be a list of {"role": text, "content": text}',
    "conversations": '"conversations" must be a list of {"from": text, "value": text}',
}
_TEXTS = "its fields must be texts"
