"""Load or make the frozen token table: GPT-2's `wte`, a table computed from text, or random numbers.

Input embeddings are normalised, so the scale of the table affects only the output head. In a table that is
computed from text, each token of the text has a vector of norm 1. In GPT-2's table, the norm is about 4.
"""

from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..files import digest, source_digest
from ..progress import status_line
from .config import DataConfig
from .conversations import Conversations
from .cooccurrence import build_table
from .hub import GPT2, download
from .tokens import GPT2_VOCAB_SIZE, cached_tensors, load_tokenizer, tokenizer_digest, train_stream

WTE, GPT2_WIDTH = "wte.weight", 768
# `data.row_length` sets this quantile of the norms of the table's rows.
LONG_ROW = 0.99


@dataclass(frozen=True)
class TokenTable:
    """A table with one vector per token, on the CPU."""

    weight: torch.Tensor  # float32 [vocab_size, hidden_size]
    # A digest of everything that determines the table, including the code.
    fingerprint: str


def load_table(
    data: DataConfig, hidden_size: int, seed: int, corpus: Conversations | None = None
) -> TokenTable:
    """Load or make the kind of table that `data.table` names.

    Args:
        seed: the random seed for `data.table=random`.
        corpus: the conversations from which the table is computed if `data.table=cooccurrence`.

    Raises:
        UserError: the table cannot be read, or `hidden_size` is not the width of GPT-2's table.
    """
    if data.table == "gpt2":
        weight = _gpt2_table(hidden_size)
    elif data.table == "cooccurrence":
        weight = _cooccurrence_table(data, corpus, hidden_size)
    else:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(GPT2_VOCAB_SIZE, hidden_size, generator=generator) / hidden_size**0.5
    if data.row_length:
        lengths = weight.norm(dim=1)
        weight = weight * (data.row_length / lengths.kthvalue(round(LONG_ROW * len(lengths))).values)
    return TokenTable(weight, table_fingerprint(data, hidden_size, seed, corpus))


def table_fingerprint(data: DataConfig, hidden_size: int, seed: int, corpus: Conversations | None) -> str:
    """Return the fingerprint of the table that `load_table` would return, without reading the table."""
    made_from: list[object] = ["random", hidden_size, seed]
    if data.table == "gpt2":
        made_from = [WTE, *GPT2]
    elif data.table == "cooccurrence":
        made_from = [_cooccurrence_key(data, corpus, hidden_size)]
    return digest([made_from, source_digest("data.token_table"), data.row_length])


def corpus_ids(data: DataConfig, corpus: Conversations) -> torch.Tensor:
    """Return the token ids of the split `corpus`, uint16 `[num_tokens]`."""
    return train_stream(corpus, load_tokenizer(data.tokenizer)).ids


def corpus_counts(data: DataConfig, corpus: Conversations) -> torch.Tensor:
    """Count how often each token occurs in the split `corpus`. Returns int64 `[vocab_size]`."""
    return torch.bincount(corpus_ids(data, corpus).int(), minlength=GPT2_VOCAB_SIZE)


def check_width(table: str, hidden_size: int) -> None:
    """Raise a UserError if a table of this kind cannot have vectors of length `hidden_size`."""
    if table == "gpt2" and hidden_size != GPT2_WIDTH:
        raise UserError(
            f"model.hidden_size is {hidden_size}, allowed with data.table=gpt2: {GPT2_WIDTH}; "
            f"set model.hidden_size={GPT2_WIDTH}, or a table of any width: data.table=random or cooccurrence."
        )


def _cooccurrence_key(data: DataConfig, corpus: Conversations | None, hidden_size: int) -> str:
    """Return a digest of everything that determines a co-occurrence table."""
    text = [corpus and corpus.fingerprint, tokenizer_digest(data.tokenizer)]
    return digest([source_digest("data.cooccurrence"), text, hidden_size, data.neighbours])


def _cooccurrence_table(data: DataConfig, corpus: Conversations | None, hidden_size: int) -> torch.Tensor:
    """Compute the table from the split `corpus`, or read the table from the shared cache."""
    assert corpus is not None

    def make() -> dict[str, torch.Tensor]:
        stream = train_stream(corpus, load_tokenizer(data.tokenizer))
        with status_line("Making the token table"):
            return {"weight": build_table(stream, GPT2_VOCAB_SIZE, hidden_size, data.neighbours)}

    return cached_tensors("cooccurrence", _cooccurrence_key(data, corpus, hidden_size), make)["weight"]


def _gpt2_table(hidden_size: int) -> torch.Tensor:
    """Memory-map the table from GPT-2's checkpoint in the Hub's cache."""
    check_width("gpt2", hidden_size)
    path = download(GPT2, "model.safetensors")
    try:
        with safe_open(path, "pt") as file:
            table: torch.Tensor = file.get_tensor(WTE)
            return table
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run again.") from error
