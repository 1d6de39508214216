"""A file of one's own as a source of conversations: how it is split, and sizes that fit it."""

import math
import os
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import cache_dir, checksum, digest, read_sealed_json, write_sealed_json
from ..locks import made_once
from ..progress import say, stage
from ..runs.config import COMPARED_RATIO, PRESETS, DataConfig, ExperimentConfig, build_config
from .chitchat import chitchat_rows
from .formats import kind_of, opened, read_rows
from .rows import Row, Rows, Split, keep_rows, kept_rows

VALIDATION_SHARE = 0.1
VALIDATION_MOST = 100  # conversations; more would only cost time, as for the test
VALIDATION_LIMIT = 1 / 3  # of the conversations, even if they hold less than ...
LEAST_WINDOWS = 2  # ... so many context windows of text, below which a split says little
TEST_SHARE = 0.1  # of the conversations; a file of fewer than ten has no test
CHARACTERS_A_TOKEN = 4  # of English

FORMATS_VERSION = 1  # raise it when a file is read otherwise: it is part of its copy's key
PIECE_ROWS = 1000
COUNT = "rows.json"  # of a whole copy; written last


def kept_file(path: Path) -> Rows:
    """Every conversation of a file, from its Arrow copy in the shared cache, made if there is none yet.

    Raises:
        UserError: the file or one of its conversations cannot be read.
    """
    path = Path(os.path.expanduser(path))  # Path.expanduser raises where there is no such user
    key = _key(path)
    folder = cache_dir() / f"file-{key}"

    def read() -> Rows:
        return kept_rows(folder, range(read_sealed_json(folder / COUNT)["rows"]))

    def make() -> None:
        with stage(f"Reading {path.name}"):
            count = _copy(path, folder)
        if _key(path) != key:
            raise UserError(f"{path} changed while it was read; run again when it is complete.")
        write_sealed_json(folder / COUNT, {"rows": count})

    return made_once(read, make)


def _key(path: Path) -> str:
    """Changes when the file's content does, or how it would be read."""
    kind = kind_of(path)
    with opened(path):
        return digest([checksum(path), kind, path.suffix, FORMATS_VERSION])


def _copy(path: Path, folder: Path) -> int:
    """Keep all rows of a file in pieces; returns how many there are."""
    from pyarrow import Table

    rows, count = read_rows(path), 0
    while piece := list(islice(rows, PIECE_ROWS)):
        names = [name for name, _ in piece]
        keep_rows(folder, count, names, Table.from_pydict({"messages": [messages for _, messages in piece]}))
        count += len(piece)
    return count


def file_rows(data: DataConfig, split: Split) -> Rows:
    """The beginning of the file is for training, its end for validation; before that come table and test.

    A token table made from text takes the conversations before validation (`data.corpus=own`), or those of
    chitchat-dataset and all of the file but validation and test. `data.samples` has no say, so that
    experiments of all sizes share one table.

    Raises:
        UserError: the splits are larger than the file.
    """
    rows = kept_file(Path(str(data.path)))
    sizes = _asked(data)
    if sum(sizes.values()) > len(rows):
        shown = " + ".join(f"{count:,} for {_PURPOSE[name]} (data.{name})" for name, count in sizes.items())
        raise UserError(
            f"{data.path} has {len(rows):,} conversations, but {shown} are asked for; "
            "ask for fewer, or leave these settings out: the sizes then fit the file."
        )
    validation = len(rows) - data.validation_samples
    corpus = validation - sizes.get("corpus_samples", 0)
    test = corpus - data.test_samples
    if split == "corpus" and data.corpus != "own":
        return chitchat_rows(data, "corpus") + rows[:test]
    return {
        "train": rows[: data.samples],
        "test": rows[test:corpus],
        "corpus": rows[corpus:validation],
        "validation": rows[validation:],
    }[split]


_PURPOSE = {
    "samples": "training",
    "validation_samples": "validation",
    "test_samples": "the test",
    "corpus_samples": "the token table",
}


def _asked(data: DataConfig) -> dict[str, int]:
    """Conversations of the file by the setting that asks for them."""
    names = ["samples", "validation_samples"]
    if data.test_samples:
        names.append("test_samples")
    if data.reads_corpus and data.corpus == "own":
        names.append("corpus_samples")
    return {name: getattr(data, name) for name in names}


def configure(
    preset: str,
    recipe: str | None = None,
    samples: int | None = None,
    settings: dict[str, Any] | None = None,
    tell: Callable[[str], None] = say,
) -> ExperimentConfig:
    """`build_config`; where the settings name a file, sizes that are not asked for fit it.

    Args:
        tell: gets a line that says how the file is split, if any size was left open.

    Raises:
        UserError: as `build_config`; the file cannot be read, or is too small.
    """
    asked = {**(settings or {}), **({} if samples is None else {"data.samples": samples})}
    if asked.get("data.path") is not None:
        asked.setdefault("data.source", "file")
    config = build_config(preset, recipe, None, asked)
    if config.data.source != "file":
        return config
    rows = kept_file(Path(str(config.data.path)))
    sizes = {name: value for name, value in _fitting(rows, config, asked).items() if name not in asked}
    config = config.replace(sizes)
    if sizes:
        tell(_split_in_words(rows, config.data))
    return config


def _fitting(rows: Rows, config: ExperimentConfig, asked: dict[str, Any]) -> dict[str, Any]:
    """Sizes for a file: a tenth for validation, one for the test if there is room, all else for training.

    No text is lost to the token table.
    """
    if len(rows) < 2:
        raise UserError(
            f"{config.data.path} has {len(rows)} conversation; 2 are the least, for training and validation."
        )
    fitting: dict[str, Any] = {"data.validation_samples": _validation_size(rows, config.model.context_window)}
    if config.data.reads_corpus and "data.corpus_samples" not in asked:
        fitting["data.corpus"] = "chitchat+own"
    least = config.replace({"data.samples": 1, "data.test_samples": 0, **fitting, **asked})
    room = len(rows) - sum(_asked(least.data).values())
    if "data.test_samples" not in asked:
        test = min(VALIDATION_MOST, int(TEST_SHARE * len(rows)), max(0, room))
        fitting["data.test_samples"], room = test, room - test
    return {**fitting, "data.samples": max(1, 1 + room)}


def _validation_size(rows: Rows, context_window: int) -> int:
    """Conversations at the end of the file that make a validation text."""
    share = min(VALIDATION_MOST, math.ceil(VALIDATION_SHARE * len(rows)))
    most = max(1, int(VALIDATION_LIMIT * len(rows)))
    return min(most, max(share, _enough(reversed(rows), len(rows), context_window)))


def _enough(rows: Iterator[Row], most: int, context_window: int) -> int:
    """How many of the first rows hold `LEAST_WINDOWS` of text; `most`, if they do not."""
    wanted = LEAST_WINDOWS * context_window * CHARACTERS_A_TOKEN
    lengths = (sum(len(message["content"]) for message in messages) for _, messages in rows)
    return next((n for n, total in enumerate(accumulate(lengths), start=1) if total >= wanted), most)


def compared_samples(config: ExperimentConfig) -> tuple[int, ...]:
    """What `compare` takes unless told: the preset's counts; of a file all, and a fifth if it is enough."""
    if config.data.source != "file":
        return PRESETS[config.preset].samples
    most, rows = config.data.samples, kept_file(Path(str(config.data.path)))
    enough = _enough(iter(rows), len(rows), config.model.context_window)
    return min(most, max(most // COMPARED_RATIO, enough)), most


def _split_in_words(rows: Rows, data: DataConfig) -> str:
    sizes = ", ".join(f"{count:,} for {_PURPOSE[name]}" for name, count in _asked(data).items())
    made = {"gpt2": "GPT-2's", "random": "random", "cooccurrence": "made from those"}[data.table]
    if data.table == "cooccurrence" and data.corpus != "own":
        held_back = "validation and test" if data.test_samples else "validation"
        made = f"made from {data.corpus_samples:,} of chitchat-dataset and all of these but {held_back}"
    return f"{data.path}: {len(rows):,} conversations, {sizes}; the token table is {made}."
