"""Read the conversations of a split from a built-in source, or divide the user's own data into splits.

A smaller training set is the beginning of a larger training set, and the other splits do not depend on the
number of training conversations. The best epoch is chosen on `validation`, nothing is chosen on `test`, and
the token table is built from `corpus`. Splits overlap only if `data.corpus=chitchat+own`, because `corpus`
then includes the training text.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, get_args

from ..errors import UserError
from ..files import digest, expanded
from .config import FITTED, DataConfig, Split
from .sources import SOURCES
from .texts import files_from, read_texts

# Share of the user's conversations that validation gets. The test set gets the same share.
TENTH = 0.1
# TENTH gives validation and the test at most this number of conversations each. More would only cost time.
MOST = 100
# Validation gets at most this share of the conversations, even if that is too little text.
VALIDATION_LIMIT = 1 / 3
# Minimum amount of text for reliable results, measured in context windows.
LEAST_WINDOWS = 2
CHARACTERS_A_TOKEN = 4  # average in English text
MOST_NAMED = 5  # maximum file names per message
PURPOSES = {
    "samples": "training",
    "validation_samples": "validation",
    "test_samples": "the test",
    "corpus_samples": "the token table",
}


@dataclass(frozen=True)
class Conversations:
    """A list of conversations, with a digest of their texts."""

    # One text per conversation: its messages joined with newlines, without roles. Do not change the list.
    texts: list[str]
    fingerprint: str

    @classmethod
    def of(cls, texts: list[str]) -> "Conversations":
        # Hash one text at a time, to save memory.
        return cls(texts, digest([digest(text) for text in texts]))

    def __len__(self) -> int:
        return len(self.texts)


def load_conversations(data: DataConfig, split: Split) -> Conversations:
    """Read the conversations of a split. Settings such as `data.samples` give the number of conversations.

    Raises UserError if the source has too few conversations, or is missing, damaged or unreachable.
    """
    return Conversations.of(own_texts(data, split) if data.path else _source_texts(data, split, data.source))


def check_splits(data: DataConfig) -> None:
    """Check the splits without a download. Raises the same errors as `load_conversations`."""
    for split in get_args(Split):
        if split == "corpus" and not data.reads_corpus:
            continue
        if data.path:
            own_texts(data, split)
        else:
            _size(data, split, data.source)


def _size(data: DataConfig, split: Split, source: str) -> int:
    """Return the size of a split. Raises UserError if the source has too few conversations."""
    name, size, available = data.size_setting(split), data.size(split), SOURCES[source].available(split)
    if size > available:
        raise UserError(
            f"data.{name} is {size}, but {SOURCES[source].title} has only {available} conversations for "
            f"{split}; lower data.{name} or use a larger source."
        )
    return size


def _source_texts(data: DataConfig, split: Split, source: str) -> list[str]:
    return SOURCES[source].read(split, _size(data, split, source))


def own_texts(data: DataConfig, split: Split) -> list[str]:
    """Read a split of the user's data.

    The training split is taken from the start of the data. The test split, the text for the token table and
    the validation split are taken from the end, in this order. With `data.corpus=chitchat+own`, the text for
    the token table does not depend on the number of training conversations. Raises UserError if the splits
    need more conversations than the data has.
    """
    train, held_back, tested = (data.size(name) for name in ("train", "validation", "test"))
    texts, sizes = read_texts(str(data.path), data.split), _sizes(data)
    if sum(sizes.values()) > len(texts):
        shown = " + ".join(f"{count:,} for {PURPOSES[name]} (data.{name})" for name, count in sizes.items())
        raise UserError(
            f"{data.path} has {len(texts):,} conversations, but {shown} are asked for; "
            "ask for fewer, or leave these settings out: the sizes then fit the data."
        )
    validation = len(texts) - held_back
    corpus = validation - sizes.get("corpus_samples", 0)
    test = corpus - tested
    if split == "corpus" and data.corpus != "own":
        return _source_texts(data, split, "chitchat") + texts[:test]
    rows = {"train": slice(train), "test": slice(test, corpus)}
    rows |= {"corpus": slice(corpus, validation), "validation": slice(validation, None)}
    return texts[rows[split]]


def fitting_sizes(data: DataConfig, context_window: int) -> dict[str, Any]:
    """Choose split sizes that fit the user's data. Returns `{name: value}` for the settings that are None.

    Validation gets a tenth of the conversations, or more if a tenth has less text than `LEAST_WINDOWS`, but
    at most a third. The test set also gets a tenth of all conversations, and training gets the rest. The
    token table is built from chitchat-dataset and from all of the user's conversations except those for
    validation and test. Raises UserError if the data cannot be read, or has fewer than two conversations.
    """
    missing = [name for name in FITTED if getattr(data, name) is None]
    if not missing:
        return {}
    texts = read_texts(str(data.path), data.split)
    count, tenth = len(texts), TENTH * len(texts)
    if count < 2:
        separated = "in a .txt file, a blank line separates them"
        raise UserError(f"{data.path} has {count} conversation; to train and validate, give 2 ({separated}).")
    enough = max(min(MOST, math.ceil(tenth)), _enough(reversed(texts), count, context_window))
    sizes: dict[str, Any] = {"validation_samples": min(max(1, int(VALIDATION_LIMIT * count)), enough)}
    sizes["corpus"] = "chitchat+own" if data.reads_corpus else "own"
    # Start with the minimum sizes. Training and the test then share the remaining conversations.
    sizes |= {"samples": 1, "test_samples": 0}
    sizes = {name: sizes[name] for name in missing}
    left = max(0, count - sum(_sizes(replace(data, **sizes)).values()))
    if "test_samples" in sizes:
        sizes["test_samples"] = min(MOST, int(tenth), left)
    if "samples" in sizes:
        sizes["samples"] += left - sizes.get("test_samples", 0)
    return sizes


def comparable_samples(data: DataConfig, context_window: int, ratio: int) -> tuple[int, int]:
    """Choose two training sizes to compare: a part of the training data with enough text, and all of it."""
    texts = read_texts(str(data.path), data.split)
    enough = _enough(texts, len(texts), context_window)
    larger = data.size("train")
    return min(larger, max(larger // ratio, enough)), larger


def describe_split(data: DataConfig) -> str:
    """Describe how the user's data is split and how the token table is made.

    If the data is a folder, the description names the files without training conversations. For example, if
    each file has a different author, all texts by one author may be in the test. Raises UserError if the data
    is too small.
    """
    own_texts(data, "train")
    sizes = ", ".join(f"{count:,} for {PURPOSES[name]}" for name, count in _sizes(data).items())
    table = {"gpt2": "GPT-2's", "random": "random", "cooccurrence": "made from those"}[data.table]
    if data.table == "cooccurrence" and data.corpus != "own":
        held_back = "validation or the test" if data.test_samples else "validation"
        table = f"made from {data.corpus_samples:,} of chitchat-dataset and all of these not for {held_back}"
    count = len(read_texts(str(data.path), data.split))
    line = f"{data.path}: {count:,} conversations, {sizes}; the token table is {table}."
    folder = expanded(str(data.path))
    unseen = files_from(folder, data.size("train")) if folder.is_dir() else []
    if not unseen:
        return line
    names = ", ".join(str(file.relative_to(folder)) for file in unseen[:MOST_NAMED])
    more = f" and {len(unseen) - MOST_NAMED:,} more" if len(unseen) > MOST_NAMED else ""
    return f"{line} Training uses no conversation from {names}{more}; mix the files to train on all of them."


def _sizes(data: DataConfig) -> dict[str, int]:
    """Return the number of the user's conversations in each split, by the name of its setting."""
    holds_corpus = data.reads_corpus and data.corpus == "own"
    names = [name for name in PURPOSES if holds_corpus or name != "corpus_samples"]
    return {name: count for name in names if (count := getattr(data, name))}


def _enough(texts: Iterable[str], most: int, context_window: int) -> int:
    """Return how many of the first texts fill `LEAST_WINDOWS` windows, or `most` if no number does."""
    wanted = LEAST_WINDOWS * context_window * CHARACTERS_A_TOKEN
    return next((n for n, total in enumerate(accumulate(map(len, texts)), start=1) if total >= wanted), most)
