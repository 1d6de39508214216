"""Read files of conversations: JSONL, JSON, CSV, TSV, Parquet and plain text.

Each record is recognised by the names of its fields (`FORMS`, or `data.columns`). An error names the first
invalid record by file and line, or row.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from .rows import Messages, Row

Records = Iterator[tuple[str, Any]]  # its place ("line 3"), and its content
Fields = tuple[str, ...]

FILES = ".jsonl, .json, .csv, .tsv, .txt (each also as .gz) or .parquet"
CHATS = ("messages", "conversations")  # fields of all messages, as OpenAI and ShareGPT name them
ALPACA = ("instruction", "output")  # and sometimes "input"
PAIRS: tuple[Fields, ...] = (ALPACA, ("prompt", "completion"), ("question", "answer"))
# Required fields of a record; the first match is used. The last of several fields is the answer.
FORMS: tuple[Fields, ...] = (*((name,) for name in CHATS), *PAIRS, ("text",), ("content",))
TURN = '{"role": text, "content": text} or {"from": text, "value": text}'
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
LONGEST_FIELD = 2**31 - 1  # characters of a CSV's field: the largest limit that all systems allow
PARQUET_ROWS = 256  # at a time
LIKENESS = 0.85  # similarity of a field's name and an allowed one, above which it counts as mistyped


def kind_of(path: Path) -> str:
    """Find a file's kind by its name, ".jsonl" or another of `READERS`; a UserError if it has none."""
    if not path.exists():
        raise UserError(f"{path.absolute()} does not exist; name a {FILES} file.")
    kind = next((s for s in map(str.lower, reversed(path.suffixes)) if s != ".gz"), "")
    if kind not in READERS:
        raise UserError(f"{path} is of no known kind; allowed: {FILES}.")
    return kind


def read_rows(path: Path, columns: str | None = None) -> Iterator[Row]:
    """Read a file's conversations one by one, named by the file's kind and their place in it ("jsonl:3").

    `columns` are those of `DataConfig`. Raises a UserError if the file or one of its records cannot be read.
    """
    kind, place = kind_of(path), None
    forms = FORMS
    if columns:
        names = [name.strip() for name in columns.split(",")]
        _refuse_twice("data.columns", names)
        forms = (tuple(names),)
    for place, value in READERS[kind](path):
        header = "line 1" if READERS[kind] is _table else place
        fields = _fields_of(f"{path}, {header}", value, forms)
        yield f"{kind[1:]}:{place.split()[-1]}", _messages(f"{path}, {place}", value, fields)
    if place is None:
        raise UserError(f"{path} is blank; give a file with at least one conversation.")


# From a file to records


@contextmanager
def opened(path: Path) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    """Open a file's bytes, unpacked if it is a .gz file; a failure inside the block is a UserError."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); name a readable {FILES} file.") from error


def _lines(path: Path) -> Iterator[str]:
    """Decode line by line, with line ends, without the byte order mark of some files."""
    with opened(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig")
                if "\0" in line:
                    raise ValueError("zero bytes, as in UTF-16")
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number} is not text in UTF-8 ({error}); save it as UTF-8."
                ) from None
            yield line


def _parsed(path: Path, text: str, place: str = "") -> Any:
    def record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            _refuse_twice(f"{path}{place}", [name for name, _ in pairs], "field")
        return fields

    try:
        return json.loads(text, object_pairs_hook=record)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        array = "one array of conversations, or " if kind_of(path) == ".json" else ""
        where = (
            f"{error.msg}, column {error.colno}"
            if place and isinstance(error, json.JSONDecodeError)
            else error
        )
        raise UserError(
            f"{path}{place} is not JSON ({where}); write {array}one conversation a line."
        ) from None


def _json_lines(path: Path) -> Records:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield f"line {number}", _parsed(path, line, f", line {number}")


def _json(path: Path) -> Records:
    """Read one array of conversations as a whole, else JSON lines in a .json file."""
    first = next((line for line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        return _json_lines(path)
    values = _parsed(path, "".join(_lines(path)))
    return ((f"item {number}", value) for number, value in enumerate(values, start=1))


def _table(path: Path) -> Records:
    """Read CSV or TSV with a header line; the separator of CSV is the most frequent one in it."""
    csv.field_size_limit(LONGEST_FIELD)
    # Lines may also end with a carriage return alone.
    lines = (part for line in _lines(path) for part in io.StringIO(line, newline=""))
    names = next(lines, "")
    separator = "\t" if kind_of(path) == ".tsv" else max(",;\t", key=names.count)
    reader = csv.DictReader(chain([names], lines), delimiter=separator, strict=True)
    begin = 1  # line of the record that is read
    try:
        columns = [name for name in reader.fieldnames or () if name]
        if names and not columns:
            raise UserError(f"{path}, line 1 is blank; write the names of the columns there.")
        _refuse_twice(f"{path}, line 1", columns)
        begin += reader.line_num
        for record in reader:
            if any(record.get(None) or ()):
                raise UserError(
                    f"{path}, line {reader.line_num} has more cells than the header; put texts with the "
                    "separator in quotes."
                )
            if None in record.values():
                raise UserError(f"{path}, line {reader.line_num} has fewer cells than the header; add them.")
            yield f"line {reader.line_num}", record
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {begin} is not CSV ({error}); close its quotes, and double those in a text."
        ) from None


def _refuse_twice(where: str, names: list[str], what: str = "column") -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where} has the {what} {one_line(twice[0])} twice; rename or delete one.")


def _parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    with opened(path) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            _refuse_twice(str(path), parquet.schema_arrow.names)
            batches = parquet.iter_batches(batch_size=PARQUET_ROWS)
            records = (record for batch in batches for record in batch.to_pylist())
            yield from ((f"row {number}", record) for number, record in enumerate(records, start=1))
        except UserError:
            raise
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # also of columns not asked for
            raise UserError(
                f"{path} cannot be read as Parquet ({error}); write it again, without such columns."
            ) from error


def _text(path: Path) -> Records:
    """Read plain text: each block between blank lines is one conversation."""
    unix = (line.replace("\r\n", "\n") for line in _lines(path))
    groups = groupby(unix, key=lambda line: bool(line.strip()))
    blocks = ("".join(group).strip() for is_text, group in groups if is_text)
    return ((f"block {n}", {"text": text}) for n, text in enumerate(blocks, start=1))


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


def _fields_of(where: str, record: Any, forms: Iterable[Fields]) -> Fields:
    """Find the form of a record."""
    if isinstance(record, list):
        raise UserError(f"{where} is a list; write a conversation a line, or name a file of one list .json.")
    found = list(record) if isinstance(record, dict) else []
    if forms is FORMS and {"role", "content"} <= set(found):
        raise UserError(
            f'{where} is one message; write all messages of a conversation in one record: "messages" must be '
            f"a list of {TURN}."
        )
    if fields := next((names for names in forms if set(names) <= set(found)), None):
        return fields
    has = one_line(f"the fields {', '.join(map(str, found[:8]))}") if found else "no fields"
    allowed = "; ".join(" and ".join(form) for form in forms)
    names = dict.fromkeys(chain(*forms))
    meant = (get_close_matches(str(name).casefold(), names, 1, LIKENESS) for name in found[:8])
    hint = f" Did you mean {close}?" if (close := ", ".join(chain(*meant))) else ""
    others = "other names with data.columns (evaluate: --columns)"
    raise UserError(f"{where} has {has}; allowed: {allowed}, or {others}.{hint}")


def _messages(where: str, record: dict[str, Any], fields: Fields) -> Messages:
    *questions, last = ("instruction", "input", "output") if fields == ALPACA else fields
    value, absent = record[last], ("", None) if fields == ALPACA else ("",)
    asked: list[Any] = [part for name in questions if (part := record.get(name)) not in absent]
    try:
        if questions:
            question = {"role": "user", "content": "\n".join(asked)}
            messages = [question, {"role": "assistant", "content": value + ""}]
        elif last in CHATS or isinstance(value, list):
            messages = [_message(number, turn) for number, turn in enumerate(value, start=1)]
        else:
            messages = [{"role": "", "content": value + ""}]  # values other than text raise a TypeError
        "".join(text for message in messages for text in message.values()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half of a surrogate pair, which no text can; write the whole character."
        ) from None
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from None
    except (TypeError, KeyError, AttributeError):
        expected = "its fields must be texts, or a single one a list of messages"
        if not questions and last in CHATS:
            expected = f'"{last}" must be a list of {TURN}'
        raise UserError(f"{where}: {expected}; correct it.") from None
    if not any(message["content"].strip() for message in messages):
        raise UserError(
            f"{where} is an empty conversation; give it at least one message with text, or delete it."
        )
    return messages


def _message(number: int, turn: Any) -> dict[str, str]:
    """Read a turn of OpenAI's or ShareGPT's form; TypeError, KeyError or AttributeError for others."""
    is_sharegpt = turn.get("content") is None and "value" in turn  # a score may also be named "value"
    role, content = ("from", "value") if is_sharegpt else ("role", "content")
    parts = turn[content]
    if parts is None and not (turn.get("tool_calls") or turn.get("function_call")):
        raise ValueError(f'turn {number} has "{content}": null; give it a text, or delete the turn')
    if parts is None or isinstance(parts, list):
        texts = (part for part in parts or () if (part.get("type") or "text").endswith("text"))
        parts = "".join(part["text"] for part in texts)  # also OpenAI's input_text and output_text
    name = turn.get(role, "")
    return {"role": ROLES.get(name, name) + "", "content": parts + ""}
