"""The caches that Phase 2 trains on, and the batches that windows gather from them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

# Dtype of cached contexts and of matrix products in training, by precision.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Tensors:
    """A dataclass that holds tensors and tuples of tensors; its methods leave other values unchanged."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with `change` applied to each tensor."""

        def changed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(changed, value))
            return change(value) if isinstance(value, Tensor) else value

        return replace(self, **{field.name: changed(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device) -> Self:
        """Return a copy on a device. Copies to a GPU use pinned memory and do not block."""

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
        embeddings: normed token embeddings, float32 `[n, hidden_size]`, which the published layout stores;
            if None, the model looks up the same values in its own table.
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
    """The inputs of a layer for predicting the next token at n positions of a stream.

    Attributes:
        tokens: the current tokens, int32 `[n]`.
        targets: the next tokens, int64 `[n]`.
        inputs: the other arguments of the layer's `forward`: `window` and `present`, or `start`.
        embeddings: the normed embeddings of `tokens`, float32 `[n, hidden_size]`; if None, the model looks
            them up.
        rows: rows of consecutive tokens, int32 `[rows, length]`, for a layer that reads tokens: it gets the
            embeddings of the rows. If None, the layer gets the embeddings of `tokens`.
        places: int64 `[n]`, the index of each of the n positions in the layer's flattened hidden states. If
            None, the layer returns exactly the hidden states of the n positions.
        copied: tokens and shares, both `[n, reach]`, for `copying.mix`; None if nothing is copied.
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
