"""The user's own file as a source of conversations: cached copy, splits, and fitting sizes."""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import cache_dir, checksum, digest, expanded
from ..locks import made_once
from ..progress import stage
from .chitchat import chitchat_rows
from .formats import kind_of, opened, read_rows
from .rows import Row, Rows, Split, keep_rows, kept_rows
from .settings import DataConfig

VALIDATION_SHARE = 0.1
VALIDATION_MOST = 100  # conversations; more would only cost time, as for the test
VALIDATION_LIMIT = 1 / 3  # of the conversations, even if they hold less than ...
LEAST_WINDOWS = 2  # ... so many context windows of text, below which a split says little
TEST_SHARE = 0.1  # of the conversations; a file of fewer than ten has no test
CHARACTERS_A_TOKEN = 4  # of English
PURPOSES = {
    "samples": "training",
    "validation_samples": "validation",
    "test_samples": "the test",
    "corpus_samples": "the token table",
}

FORMATS_VERSION = 7  # raise it when reading changes: it is part of the copy's key


def kept_file(path: Path, columns: str | None = None) -> Rows:
    """Read every conversation of a file, from its copy in the shared cache; raises as `read_rows`."""
    path = expanded(path)
    key = _key(path, columns)
    copy = cache_dir() / f"file-{key}"

    def unchanged() -> Iterator[Row]:
        with stage(f"Reading {path.name}"):
            yield from read_rows(path, columns)
        if _key(path, columns) != key:
            raise UserError(f"{path} changed while it was read; run again when it is complete.")

    return made_once(lambda: kept_rows(copy, key), lambda: keep_rows(copy, key, unchanged()))


def _key(path: Path, columns: str | None) -> str:
    """Digest the file's content and all that affects how it is read."""
    kind = kind_of(path)
    with opened(path):
        return digest([checksum(path), kind, path.suffix, columns, FORMATS_VERSION])


def _file_of(data: DataConfig) -> Rows:
    return kept_file(Path(str(data.path)), data.columns)


def file_rows(data: DataConfig, split: Split) -> Rows:
    """Read a split: training from the beginning of the file, then test, table text and validation at its end.

    A token table made from text takes the conversations before validation (`data.corpus=own`), or those of
    chitchat-dataset and all of the file but validation and test: experiments of all sizes share one table.
    Raises a UserError if the splits are larger than the file.
    """
    rows = _large_enough(data)
    validation = len(rows) - data.validation_samples
    corpus = validation - _asked(data).get("corpus_samples", 0)
    test = corpus - data.test_samples
    if split == "corpus" and data.corpus != "own":
        return chitchat_rows(data, "corpus") + rows[:test]
    return {
        "train": rows[: data.samples],
        "test": rows[test:corpus],
        "corpus": rows[corpus:validation],
        "validation": rows[validation:],
    }[split]


def _large_enough(data: DataConfig) -> Rows:
    """Return the rows of a file; a UserError if the splits are larger."""
    rows, sizes = _file_of(data), _asked(data)
    if sum(sizes.values()) > len(rows):
        shown = " + ".join(f"{count:,} for {PURPOSES[name]} (data.{name})" for name, count in sizes.items())
        raise UserError(
            f"{data.path} has {len(rows):,} conversations, but {shown} are asked for; "
            "ask for fewer, or leave these settings out: the sizes then fit the file."
        )
    return rows


def _asked(data: DataConfig) -> dict[str, int]:
    """Return the number of conversations of the file that each setting asks for."""
    sizes = {name: getattr(data, name) for name in PURPOSES}
    if not (data.reads_corpus and data.corpus == "own"):
        del sizes["corpus_samples"]
    return {name: count for name, count in sizes.items() if count}


def fitting_sizes(data: DataConfig, asked: Collection[str], context_window: int) -> dict[str, Any]:
    """Choose split sizes: a tenth for validation, one for the test if there is room, the rest for training.

    Args:
        asked: names of the settings that the user has set; they stay as they are in `data`.
        context_window: tokens that one position can reach.

    Returns:
        `{name: value}` of settings of `data` that are not asked for.

    Raises:
        UserError: the file cannot be read, or has fewer than two conversations.
    """
    rows = _file_of(data)
    if len(rows) < 2:
        is_text = kind_of(expanded(str(data.path))) == ".txt"
        apart = "; a blank line separates conversations" if is_text else ""
        raise UserError(
            f"{data.path} has {len(rows)} conversation; at least 2 are needed to train and validate{apart}."
        )
    sizes: dict[str, Any] = {"validation_samples": _validation_size(rows, context_window)}
    if data.reads_corpus and "corpus_samples" not in asked:
        sizes["corpus"] = "chitchat+own"
    sizes |= {"samples": 1, "test_samples": 0}
    sizes = {name: value for name, value in sizes.items() if name not in asked}
    room = max(0, len(rows) - sum(_asked(replace(data, **sizes)).values()))
    if "test_samples" in sizes:
        sizes["test_samples"] = min(VALIDATION_MOST, int(TEST_SHARE * len(rows)), room)
    if "samples" in sizes:
        sizes["samples"] += room - sizes.get("test_samples", 0)
    return sizes


def _validation_size(rows: Rows, context_window: int) -> int:
    """Count the conversations at the end of the file that make a validation split."""
    share = min(VALIDATION_MOST, math.ceil(VALIDATION_SHARE * len(rows)))
    most = max(1, int(VALIDATION_LIMIT * len(rows)))
    backwards = (row for place in reversed(range(len(rows))) for row in rows[place : place + 1])
    return min(most, max(share, _enough(backwards, len(rows), context_window)))


def _enough(rows: Iterable[Row], most: int, context_window: int) -> int:
    """Count the first rows that hold `LEAST_WINDOWS` of text; `most`, if they do not."""
    wanted = LEAST_WINDOWS * context_window * CHARACTERS_A_TOKEN
    lengths = (sum(len(message["content"]) for message in messages) for _, messages in rows)
    return next((n for n, total in enumerate(accumulate(lengths), start=1) if total >= wanted), most)


def comparable_samples(data: DataConfig, context_window: int, ratio: int) -> tuple[int, int]:
    """Choose training sizes to compare: the whole file, and a share of it with enough text."""
    rows = _file_of(data)
    enough = _enough(rows, len(rows), context_window)
    return min(data.samples, max(data.samples // ratio, enough)), data.samples


def describe_split(data: DataConfig) -> str:
    """Describe in a line how a file is split and what the token table is made from.

    Raises a UserError if the splits are larger than the file.
    """
    rows = _large_enough(data)
    sizes = ", ".join(f"{count:,} for {PURPOSES[name]}" for name, count in _asked(data).items())
    made = {"gpt2": "GPT-2's", "random": "random", "cooccurrence": "made from those"}[data.table]
    if data.table == "cooccurrence" and data.corpus != "own":
        held_back = "validation and test" if data.test_samples else "validation"
        made = f"made from {data.corpus_samples:,} of chitchat-dataset and all of these but {held_back}"
    return f"{data.path}: {len(rows):,} conversations, {sizes}; the token table is {made}."
