"""Load or make the frozen token table: GPT-2's `wte`, one made from text alone, or random numbers.

Input embeddings are normed, so a table's scale affects the output head only. In tables made here,
tokens that occur have an embedding norm of 1, in GPT-2's one of about four.
"""

from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..files import digest, source_digest
from ..progress import stage
from .config import DataConfig
from .conversations import Conversations
from .cooccurrence import build_table
from .hub import GPT2, download
from .tokens import GPT2_VOCAB_SIZE, cached_tensors, load_tokenizer, tokenizer_digest, train_stream

WTE, GPT2_WIDTH = "wte.weight", 768
LONG_ROW = 0.99  # quantile of the embedding norms that `data.row_length` sets


@dataclass(frozen=True)
class TokenTable:
    """One vector a token, on the CPU."""

    weight: torch.Tensor  # float32 [vocab_size, hidden_size]
    fingerprint: str  # changes with every input of the table, and with the code that makes it


def load_table(
    data: DataConfig, hidden_size: int, seed: int, corpus: Conversations | None = None
) -> TokenTable:
    """Read or make the table that `data.table` names.

    `seed` is for table=random, split `corpus` for table=cooccurrence. Raises a UserError if the source cannot
    be read, or has another width than `hidden_size`.
    """
    if data.table == "gpt2":
        table = _gpt2_table(hidden_size)
    elif data.table == "cooccurrence":
        assert corpus is not None
        table = _cooccurrence_table(data, corpus, hidden_size)
    else:
        shape = (GPT2_VOCAB_SIZE, hidden_size)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / hidden_size**0.5
        table = TokenTable(weight, digest(["random", shape, seed]))
    fingerprint = digest([table.fingerprint, source_digest("data.token_table"), data.row_length])
    if not data.row_length:
        return TokenTable(table.weight, fingerprint)
    lengths = table.weight.norm(dim=1)
    factor = data.row_length / lengths.kthvalue(round(LONG_ROW * len(lengths))).values
    return TokenTable(table.weight * factor, fingerprint)


def corpus_ids(data: DataConfig, corpus: Conversations) -> torch.Tensor:
    """Return the token ids of split corpus, uint16 `[num_tokens]`."""
    return train_stream(corpus, load_tokenizer(data.tokenizer)).ids


def corpus_counts(data: DataConfig, corpus: Conversations) -> torch.Tensor:
    """Count each token in split corpus: int64 `[vocab_size]`."""
    return torch.bincount(corpus_ids(data, corpus).int(), minlength=GPT2_VOCAB_SIZE)


def check_width(table: str, hidden_size: int) -> None:
    """Raise a UserError if the table named in `data.table` cannot have this width."""
    if table == "gpt2" and hidden_size != GPT2_WIDTH:
        raise UserError(
            f"model.hidden_size is {hidden_size}, allowed with data.table=gpt2: {GPT2_WIDTH}; "
            f"set model.hidden_size={GPT2_WIDTH}, or a table of any width: data.table=random or cooccurrence."
        )


def _cooccurrence_table(data: DataConfig, corpus: Conversations, hidden_size: int) -> TokenTable:
    """Make a table from split `corpus` only, shared by all runs on that corpus."""

    tokenizer = load_tokenizer(data.tokenizer)

    def make() -> dict[str, torch.Tensor]:
        stream = train_stream(corpus, tokenizer)
        with stage("Making the token table"):
            return {"weight": build_table(stream, GPT2_VOCAB_SIZE, hidden_size, data.neighbours)}

    code, text = source_digest("data.cooccurrence"), [corpus.fingerprint, tokenizer_digest(tokenizer)]
    key = digest([code, text, hidden_size, data.neighbours])
    return TokenTable(cached_tensors("cooccurrence", key, make)["weight"], key)


def _gpt2_table(hidden_size: int) -> TokenTable:
    """Read the table from GPT-2's whole checkpoint, mapped from its file in huggingface_hub's cache."""
    check_width("gpt2", hidden_size)
    path = download(GPT2, "model.safetensors")
    try:
        with safe_open(path, "pt") as file:
            return TokenTable(file.get_tensor(WTE), digest([WTE, *GPT2]))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run again.") from error
