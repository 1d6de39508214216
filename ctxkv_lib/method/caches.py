"""The caches of Phase 2, which are data only, and the batches that windows gather from them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

# Dtype of cached contexts and of the matrix products of training, by precision.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Tensors:
    """A dataclass of tensors and of tuples of tensors; other values stay as they are."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with `change` applied to each tensor."""

        def changed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(changed, value))
            return change(value) if isinstance(value, Tensor) else value

        return replace(self, **{field.name: changed(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device) -> Self:
        """Return a copy on a device; a GPU copies from pinned memory, and nothing waits for the copy."""

        def move(tensor: Tensor) -> Tensor:
            pins = device.type == "cuda" and tensor.device.type == "cpu"
            return (tensor.pin_memory() if pins else tensor).to(device, non_blocking=pins)

        return self.map(move)


@dataclass(frozen=True)
class Cache(_Tensors):
    """A cached stream of n + 1 tokens: position i reads token i and predicts token i + 1.

    Attributes:
        ids: the tokens, int32 `[n + 1]`.
        contexts: padded (see `windows`), float32 or bfloat16 `[n + 1, context_dim]`; None if the layer reads
            tokens.
        embeddings: normed token embeddings, the published layout, float32 `[n, hidden_size]`; None: the rows
            of the model's own table, which are the same.
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
    """What a layer is given to predict the next token at n positions of a stream.

    Attributes:
        tokens: the current tokens, int32 `[n]`.
        targets: the next tokens, int64 `[n]`.
        inputs: what the layer's `forward` takes after the embeddings: window and presence, or `start`.
        embeddings: the normed embeddings of `tokens`, float32 `[n, hidden_size]`; None: look them up.
        rows: rows of consecutive tokens, int32 `[rows, length]`, whose embeddings a layer that reads tokens
            is given; None: it is given the embeddings of `tokens`.
        places: where the n positions are among the hidden states that the layer returns, flattened, int64
            `[n]`; None: the hidden states are those of the n positions.
        copied: tokens and shares, both `[n, reach]`, for `copying.mix`; None: nothing is copied.
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
    """Gather rows of a tensor that may lie on another device than `rows`."""
    return tensor[rows.to(tensor.device)]
