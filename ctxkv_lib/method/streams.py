"""Streams, which are texts with their tokens and contexts, and batches of their positions."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

# The dtype of stored contexts and of matrix products in training, for each value of `precision`.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Tensors:
    """A dataclass of tensors and tuples of tensors. Its methods copy values of other types unchanged."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with `change` applied to each tensor."""

        def changed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(changed, value))
            return change(value) if isinstance(value, Tensor) else value

        return replace(self, **{field.name: changed(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device) -> Self:
        """Return a copy with all tensors on `device`. Copies to a GPU use pinned memory and do not block."""

        def move(tensor: Tensor) -> Tensor:
            pins = device.type == "cuda" and tensor.device.type == "cpu"
            return (tensor.pin_memory() if pins else tensor).to(device, non_blocking=pins)

        return self.map(move)


@dataclass(frozen=True)
class Stream(_Tensors):
    """A text of n + 1 tokens with its contexts.

    At position i, the model reads token i and predicts token i + 1.

    Attributes:
        ids: the tokens, int32 `[n + 1]`.
        contexts: the padded contexts (see `windows`), float32 or bfloat16 `[n + 1, context_dim]`; None if
            the layer reads tokens.
        embeddings: normed token embeddings, float32 `[n, hidden_size]`. Only the published cache layout
            stores embeddings; if None, the model computes the same values from its token table.
    """

    ids: Tensor
    contexts: Tensor | None = None
    embeddings: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids) - 1

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.ids, self.contexts, self.embeddings) if t is not None)


@dataclass(frozen=True)
class Batch(_Tensors):
    """What a layer needs to predict the next token at n positions of a stream.

    Attributes:
        tokens: the current tokens, int32 `[n]`.
        targets: the next tokens, int64 `[n]`.
        inputs: the other arguments of the layer's `forward`: `window` and `present`, or `start`.
        embeddings: the normed embeddings of `tokens`, float32 `[n, hidden_size]`; if None, the model
            computes the embeddings.
        rows: rows of consecutive tokens, int32 `[rows, length]`. A layer that reads tokens gets the
            embeddings of these rows. If None, the layer gets the embeddings of `tokens`.
        places: the index of each of the n positions in the layer's flattened hidden states, int64 `[n]`. If
            None, the layer returns the hidden states of exactly these n positions.
        copied: the arguments `tokens` and `shares` of `copying.mix`, both `[n, reach]`; None if nothing is
            copied.
    """

    tokens: Tensor
    targets: Tensor
    inputs: tuple[Any, ...]
    embeddings: Tensor | None = None
    rows: Tensor | None = None
    places: Tensor | None = None
    copied: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.targets)


def rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    """Gather rows of a tensor that may be on a different device from `rows`."""
    return tensor[rows.to(tensor.device)]
