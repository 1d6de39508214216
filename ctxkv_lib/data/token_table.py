"""Load or make the frozen token table: GPT-2's `wte`, a table made from text alone, or random numbers.

Input embeddings are normed, so the scale of a table affects only the output head. In a table made
from text, the vectors of tokens that occur have a norm of 1; in GPT-2's table, the norm is about 4.
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
LONG_ROW = 0.99  # `data.row_length` sets this quantile of the row norms


@dataclass(frozen=True)
class TokenTable:
    """One vector per token, on the CPU."""

    weight: torch.Tensor  # float32 [vocab_size, hidden_size]
    fingerprint: str  # changes with anything the table depends on, including the code


def load_table(
    data: DataConfig, hidden_size: int, seed: int, corpus: Conversations | None = None
) -> TokenTable:
    """Read or make the table that `data.table` names.

    Args:
        seed: the random seed, which table=random uses.
        corpus: the split `corpus`, which table=cooccurrence uses.

    Raises:
        UserError: the source cannot be read, or its width is not `hidden_size`.
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
    """Count each token in the split `corpus`: int64 `[vocab_size]`."""
    return torch.bincount(corpus_ids(data, corpus).int(), minlength=GPT2_VOCAB_SIZE)


def check_width(table: str, hidden_size: int) -> None:
    """Raise a UserError if the table named in `data.table` cannot have this width."""
    if table == "gpt2" and hidden_size != GPT2_WIDTH:
        raise UserError(
            f"model.hidden_size is {hidden_size}, allowed with data.table=gpt2: {GPT2_WIDTH}; "
            f"set model.hidden_size={GPT2_WIDTH}, or a table of any width: data.table=random or cooccurrence."
        )


def _cooccurrence_key(data: DataConfig, corpus: Conversations | None, hidden_size: int) -> str:
    """Digest what a co-occurrence table is made from."""
    text = [corpus and corpus.fingerprint, tokenizer_digest(data.tokenizer)]
    return digest([source_digest("data.cooccurrence"), text, hidden_size, data.neighbours])


def _cooccurrence_table(data: DataConfig, corpus: Conversations | None, hidden_size: int) -> torch.Tensor:
    """Make a table from the split `corpus` alone, or take it from the shared cache."""
    assert corpus is not None

    def make() -> dict[str, torch.Tensor]:
        stream = train_stream(corpus, load_tokenizer(data.tokenizer))
        with status_line("Making the token table"):
            return {"weight": build_table(stream, GPT2_VOCAB_SIZE, hidden_size, data.neighbours)}

    return cached_tensors("cooccurrence", _cooccurrence_key(data, corpus, hidden_size), make)["weight"]


def _gpt2_table(hidden_size: int) -> torch.Tensor:
    """Read the table from GPT-2's checkpoint, which is mapped from its file in the Hub's cache."""
    check_width("gpt2", hidden_size)
    path = download(GPT2, "model.safetensors")
    try:
        with safe_open(path, "pt") as file:
            table: torch.Tensor = file.get_tensor(WTE)
            return table
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run again.") from error
