"""Conversations in a JSONL file of one's own."""

import json
import zlib
from pathlib import Path
from typing import Any

from ..config import DataConfig
from ..errors import UserError
from .rows import Messages, Row, Split, first_rows


def jsonl_rows(data: DataConfig, split: Split) -> list[Row]:
    path = Path(str(data.path))
    lines = _jsonl_lines(path)
    validation = range(max(0, len(lines) - data.validation_samples), len(lines))
    corpus = range(0)
    if split == "corpus" or data.table == "cooccurrence":
        corpus = range(max(0, validation.start - data.corpus_samples), validation.start)
    train = range(corpus.start if corpus else validation.start)
    available = {"train": train, "validation": validation, "corpus": corpus}[split]
    where = f"{path} ({len(lines)} lines, {len(validation)} for validation, {len(corpus)} for the table)"
    rows = [lines[i] for i in first_rows(available, data, split, where)]
    return [(f"jsonl:{number}", _parse_line(f"{path}, line {number}", raw)) for number, raw in rows]


def read_rows(path: Path) -> list[Row]:
    """Every conversation of the file."""
    return [(f"jsonl:{n}", _parse_line(f"{path}, line {n}", raw)) for n, raw in _jsonl_lines(path)]


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
