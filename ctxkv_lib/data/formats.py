"""Files of conversations as people have them: JSONL, JSON, CSV, TSV, Parquet and plain text.

Records are recognised one by one, by the names of their fields (`RECOGNISED`); the first that cannot be
taken is named by file and line, or row.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """A file's kind by its name, ".jsonl" or another of `READERS`.

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
    """Every conversation of a file, named by what it is and where it stands in it ("jsonl:3"), one by one.

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
    """Its bytes, unpacked if it is a .gz file; what goes wrong inside the block is told as one sentence."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); name a readable {FILES} file.") from error


def _decoded(where: str, raw: bytes, encoding: str = "utf-8-sig") -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends."""
    with opened(path) as file:
        yield from enumerate(file, start=1)


def _text_lines(path: Path) -> Iterator[str]:
    """Lines as text, with their ends; without the mark that some programs put at a file's beginning."""
    for number, raw in _lines(path):
        yield _decoded(f"{path}, line {number}", raw, "utf-8-sig" if number == 1 else "utf-8")


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); write one conversation a line.") from None


def _json_lines(path: Path) -> Records:
    for number, raw in _lines(path):
        if raw.strip():
            where = f"{path}, line {number}"
            yield f"line {number}", _parsed(where, _decoded(where, raw))


def _json(path: Path) -> Records:
    """One array of conversations, which is read whole; else JSON lines under another name."""
    begins = next((rest for _, raw in _lines(path) if (rest := raw.lstrip(b"\xef\xbb\xbf \t\r\n"))), b"")
    if not begins.startswith(b"["):
        yield from _json_lines(path)
        return
    with opened(path) as file:
        values = _parsed(str(path), _decoded(str(path), file.read()))
    yield from ((f"item {number}", value) for number, value in enumerate(values, start=1))


def _table(path: Path) -> Records:
    """CSV or TSV with a line of names at the top; the separator is the one that this line has most of."""
    names = next(_text_lines(path), "")
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(_csv_lines(path), delimiter=max(",;\t", key=names.count))
    try:
        for record in reader:
            yield f"line {reader.line_num}", record
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not CSV ({error}); correct the line.") from None


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines that may also end with a carriage return alone."""
    for line in _text_lines(path):
        yield from io.StringIO(line, newline="")


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


def _blocks(path: Path) -> Records:
    """Plain text: what stands between blank lines is one conversation."""
    yield from ((f"block {n}", {"text": text}) for n, text in enumerate(_split(_text_lines(path)), start=1))


def _split(lines: Iterator[str]) -> Iterator[str]:
    """What stands between blank lines, without white space before it; of the last one, nor behind it."""
    block: list[str] = []
    ended = False
    for line in lines:
        text = line.strip()
        if ended and text:
            yield "".join(block).removesuffix("\n")
            block, ended = [], False
        line = (line if block else line.lstrip()).replace("\r\n", "\n")
        ended = ended or (bool(block) and not line.strip(" \t\n"))
        if line and not ended:
            block.append(line)
    if block:
        yield "".join(block).rstrip()


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
