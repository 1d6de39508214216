"""Files of conversations as people have them: JSONL, JSON, CSV, TSV, Parquet and plain text.

Records are recognised one by one, by the names of their fields (`RECOGNISED`); the first that cannot be
taken is named by file and line, or row.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import UserError
from .rows import Messages, Row

Record = dict[str, Any]
Records = Iterator[tuple[str, Any]]  # where it stands ("line 3"), and what stands there

FILES = ".jsonl, .json, .csv, .tsv, .txt (each also as .gz) or .parquet"
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
LONGEST_FIELD = 2**31 - 1  # characters of a CSV's field: what the reader takes on every system
PARQUET_ROWS = 256  # at a time


def kind_of(path: Path) -> str:
    """Find a file's kind by its name, ".jsonl" or another of `READERS`.

    Raises:
        UserError: there is no such file, or its kind is not known.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; name a {FILES} file.")
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "").lower()
    if kind not in READERS:
        raise UserError(f"{path} is of no known kind; allowed: {FILES}.")
    return kind


def read_rows(path: Path) -> Iterator[Row]:
    """Read a file's conversations one by one, named by the file's kind and their place in it ("jsonl:3").

    Raises:
        UserError: the file or one of its records cannot be read.
    """
    kind, place = kind_of(path), None
    for place, value in READERS[kind](path):
        yield f"{kind[1:]}:{place.split()[-1]}", _messages(f"{path}, {place}", value)
    if place is None:
        raise UserError(f"{path} is blank; give a file with at least one conversation.")


# From a file to records


@contextmanager
def opened(path: Path) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    """Open a file's bytes, unpacked if it is a .gz file; a failure inside the block is a UserError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); name a readable {FILES} file.") from error


def _lines(path: Path) -> Iterator[str]:
    """Decode line by line, with line ends, without the byte order mark of some files."""
    with opened(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number} is not UTF-8 ({error.reason} at byte {error.start}); "
                    "save it as UTF-8."
                ) from None


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); write one conversation a line.") from None


def _json_lines(path: Path) -> Records:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield f"line {number}", _parsed(f"{path}, line {number}", line)


def _json(path: Path) -> Records:
    """One array of conversations, which is read whole; else JSON lines under another name."""
    first = next((line for line in _lines(path) if line.strip()), "")
    if first.lstrip().startswith("["):
        values = _parsed(str(path), "".join(_lines(path)))
        yield from ((f"item {number}", value) for number, value in enumerate(values, start=1))
    else:
        yield from _json_lines(path)


def _table(path: Path) -> Records:
    """CSV or TSV with a line of names at the top; the separator is the one that this line has most of."""
    names = next(_lines(path), "")
    csv.field_size_limit(LONGEST_FIELD)
    # Lines may also end with a carriage return alone.
    lines = (part for line in _lines(path) for part in io.StringIO(line, newline=""))
    reader = csv.DictReader(lines, delimiter=max(",;\t", key=names.count))
    try:
        for record in reader:
            yield f"line {reader.line_num}", record
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not CSV ({error}); correct the line.") from None


def _parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    with opened(path) as file:
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS)
            records = (record for batch in batches for record in batch.to_pylist())
            yield from ((f"row {number}", record) for number, record in enumerate(records, start=1))
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} cannot be read as Parquet ({error}); write it again.") from error


def _text(path: Path) -> Records:
    """Plain text: each block between blank lines is one conversation."""
    yield from ((f"block {n}", {"text": text}) for n, text in enumerate(_blocks(_lines(path)), start=1))


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Join lines up to the next blank one, without white space before them; the last block also without
    white space after them."""
    held = ""
    unix = (line.replace("\r\n", "\n") for line in lines)
    for _, group in groupby(unix, key=lambda line: bool(line.strip(" \t\n"))):
        if block := "".join(group).lstrip():
            if held:
                yield held
            held = block.removesuffix("\n")
    if held:
        yield held.rstrip()


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".txt": _text,
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


def _form_of(where: str, record: Any) -> tuple[str, ...]:
    """Find the key of `RECOGNISED` for a record."""
    if isinstance(record, list):
        raise UserError(f"{where} is a list; write a conversation a line, or name a file of one list .json.")
    found = list(record) if isinstance(record, dict) else []
    if {"role", "content"} <= set(found):
        raise UserError(
            f"{where} is one message; write all messages of a conversation in one record: {_CHAT}."
        )
    fields = next((names for names in RECOGNISED if set(names) <= set(found)), None)
    if fields is None:
        has = f"the fields {', '.join(map(str, found[:8]))}" if found else "no fields"
        raise UserError(f"{where} has {has}; allowed: {KNOWN}.")
    return fields


def _messages(where: str, record: Any) -> Messages:
    fields = _form_of(where, record)
    try:
        messages = RECOGNISED[fields](record)
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{where}: {_FORMS.get(fields[0], _TEXTS)}; correct it.") from None
    if not any(message["content"].strip() for message in messages):
        raise UserError(
            f"{where} is an empty conversation; give it at least one message with text, or delete it."
        )
    try:
        "".join(text for message in messages for text in message.values()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half of a surrogate pair, which no text can; write the whole character."
        ) from None
    return messages


_CHAT = '"messages" must be a list of {"role": text, "content": text}'
_FORMS = {
    "messages": _CHAT,
    "conversations": '"conversations" must be a list of {"from": text, "value": text}',
}
_TEXTS = "its fields must be texts"
