"""Load or make the frozen token table: GPT-2's `wte`, a table computed from text, or random numbers.

Input embeddings are normalized, so the scale of the table affects only the output head. In a table that is
computed from text, each token of the text has a vector of norm 1. In GPT-2's table, the norm is about 4.
"""

from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .config import DataConfig
from .cooccurrence import table_of
from .hub import GPT2, download
from .tokens import GPT2_VOCAB_SIZE, TokenStream

WTE, GPT2_WIDTH = "wte.weight", 768
# `data.row_length` sets this quantile of the norms of the table's rows.
LONG_ROW = 0.99


def load_table(
    data: DataConfig, hidden_size: int, seed: int, vectors: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Load or make the kind of table that `data.table` names, float32 `[vocab_size, hidden_size]` on the CPU.

    Args:
        seed: the random seed for `data.table=random`.
        vectors: the result of `cooccurrence.token_vectors` for `data.table=cooccurrence`.

    Raises:
        UserError: the table cannot be read, or `hidden_size` is not the width of GPT-2's table.
    """
    if data.table == "gpt2":
        weight = _gpt2_table(hidden_size)
    elif data.table == "cooccurrence":
        assert vectors is not None
        weight = table_of(vectors["tokens"], vectors["vectors"], GPT2_VOCAB_SIZE, hidden_size)
    else:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(GPT2_VOCAB_SIZE, hidden_size, generator=generator) / hidden_size**0.5
    if data.row_length:
        lengths = weight.norm(dim=1)
        weight = weight * (data.row_length / lengths.kthvalue(round(LONG_ROW * len(lengths))).values)
    return weight


def token_counts(stream: TokenStream) -> torch.Tensor:
    """Count how often each token occurs in a stream. Returns int64 `[vocab_size]`."""
    return torch.bincount(stream.ids.int(), minlength=GPT2_VOCAB_SIZE)


def check_width(table: str, hidden_size: int) -> None:
    """Raise a UserError if a table of this kind cannot have vectors of length `hidden_size`."""
    if table == "gpt2" and hidden_size != GPT2_WIDTH:
        raise UserError(
            f"model.hidden_size is {hidden_size}, allowed with data.table=gpt2: {GPT2_WIDTH}; "
            f"set model.hidden_size={GPT2_WIDTH}, or a table of any width: data.table=random or cooccurrence."
        )


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
