"""Read the conversations of a split from a built-in source, or divide the user's own data into splits.

A smaller training set is the beginning of a larger training set, and the other splits do not depend on the
number of training conversations. The best epoch is chosen on `validation`, nothing is chosen on `test`, and
the token table is built from `corpus`. Splits overlap only if `data.corpus=chitchat+own`, because `corpus`
then includes the training text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ..errors import UserError
from ..files import digest
from .config import DataConfig, Split
from .sources import SOURCES
from .texts import read_texts

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


def fitting_sizes(path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the settings that divide the user's own data: 80% training, 10% validation and 10% test.

    Validation and the test have at least one conversation each. Training has all conversations that no other
    split has.

    Args:
        given: settings of `DataConfig`, by name, that the user has chosen. They are not changed.

    Returns:
        `{name: value}` for the settings that are not in `given`. If all of them are, no data is read.

    Raises:
        UserError: The data cannot be read, or has too few conversations.
    """
    fitted: dict[str, Any] = {} if "corpus" in given else {"corpus": "chitchat+own"}
    missing = [name for name in ("samples", "validation_samples", "test_samples") if name not in given]
    if not missing:
        return fitted
    count = len(read_texts(path, given.get("split")))
    sizes = {name: given.get(name, max(1, count // 10)) for name in ("validation_samples", "test_samples")}
    if given.get("corpus") == "own":
        sizes["corpus_samples"] = given.get("corpus_samples", DataConfig.corpus_samples)
    sizes["samples"] = given.get("samples", count - sum(sizes.values()))
    if sizes["samples"] < 1:
        raise UserError(
            f"{path} has {count} conversations, which is too few to train, validate and test; give more (in "
            "a .txt file, a blank line separates them), or lower data.test_samples."
        )
    return fitted | {name: sizes[name] for name in missing}


def describe_split(data: DataConfig) -> str:
    """Describe how the user's data is split and how the token table is made.

    Raises a UserError if the data has too few conversations.
    """
    own_texts(data, "train")
    sizes = ", ".join(f"{count:,} for {PURPOSES[name]}" for name, count in _sizes(data).items())
    table = {"gpt2": "GPT-2's", "random": "random", "cooccurrence": "made from those"}[data.table]
    if data.table == "cooccurrence" and data.corpus != "own":
        table = f"made from {data.corpus_samples:,} of chitchat-dataset and all of these for training"
    count = len(read_texts(str(data.path), data.split))
    return f"{data.path}: {count:,} conversations, {sizes}; the token table is {table}."


def _sizes(data: DataConfig) -> dict[str, int]:
    """Return the number of the user's conversations in each split, by the name of its setting."""
    holds_corpus = data.reads_corpus and data.corpus == "own"
    names = [name for name in PURPOSES if holds_corpus or name != "corpus_samples"]
    return {name: count for name in names if (count := getattr(data, name))}
