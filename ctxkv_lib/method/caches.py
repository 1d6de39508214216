"""The caches of Phase 2, contexts and embeddings of a stream, and the batches that are gathered from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Protocol, Self

import torch
from torch import Tensor

from .model import ContextKV
from .windows import Window


@dataclass(frozen=True)
class _Tensors:
    """A dataclass of tensors, some of which may be None."""

    def tensors(self) -> dict[str, Tensor]:
        """Return everything it holds, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with each of its tensors changed."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class Batch(_Tensors):
    """What Phase 2 reads at n positions of a stream.

    Attributes:
        tokens: int32 `[n]`, the current tokens.
        embeddings: their normed embeddings, float32 `[n, hidden_size]`, or None: gathered from the table.
        window: contexts that each position sees, `[n, slots, context_dim]`, zero where there is none.
        present: bool `[n, slots]`, the slots that hold a context.
        targets: next tokens, int64 `[n]`.
    """

    tokens: Tensor
    embeddings: Tensor | None
    window: Tensor
    present: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def attend(self, model: ContextKV) -> tuple[Tensor, Tensor | None]:
        """Compute `model.attend` at these positions: hidden states and attention weights."""
        embeddings = model.embed(self.tokens) if self.embeddings is None else self.embeddings
        return model.attend(embeddings, self.window, self.present)

    def logits(self, model: ContextKV) -> Tensor:
        """Compute the model's logits at these positions, `[n, vocab_size]`."""
        return model.logits(self.attend(model)[0], self.tokens)

    def scores(self, model: ContextKV) -> tuple[Tensor, Tensor]:
        """Compute `model.losses` at these positions: loss and correctness of each prediction."""
        return model.losses(self.attend(model)[0], self.tokens, self.targets)

    def split(self, micro_batches: int) -> Iterator[tuple[Self, slice]]:
        """Cut into so many micro-batches (or fewer), each with the rows that it has of this batch."""
        size = max(1, -(-len(self) // micro_batches))
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield self if micro_batches == 1 else self.each(itemgetter(rows)), rows

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device; a GPU copies it from pinned memory, and nothing waits for that."""

        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and tensor.device.type == "cpu":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        return self.each(move)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch's order and dropout, for any seed within what torch takes."""
    return (seed * 1_000_003 + epoch) % 2**63


Shard = Callable[[int], slice]  # which of a batch's rows a process takes; see `Loop.shard`


class TrainingStream(Protocol):
    """What Phase 2 trains on: a `StreamCache`, or contexts that are computed when they are needed.

    Its dtype is that of its contexts, and thereby of the matrix products of training. `epoch` is documented
    at `StreamCache`.
    """

    @property
    def dtype(self) -> torch.dtype: ...
    def __len__(self) -> int: ...
    def epoch(
        self, seed: int, number: int, done: int, size: int, model: ContextKV, shard: Shard
    ) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class StreamCache(_Tensors):
    """What Phase 2 reads of one stream of n + 1 tokens: n inputs, each with its target.

    Attributes:
        ids: int32 `[n + 1]`, the tokens; position i reads token i and predicts token i + 1.
        contexts: float32 or bfloat16 `[n + 1, context_dim]`, padded (see `windows`).
        embeddings: float32 `[n, hidden_size]`, normed (the published layout), or None: gathered from the
            model's own table, which gives the same rows.
        begins: int64 `[n]`, the position at which each position's conversation begins, where conversations
            are read apart; None for one stream without boundaries, as in training.
    """

    ids: Tensor
    contexts: Tensor
    embeddings: Tensor | None = None
    begins: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids) - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.contexts.dtype

    def gather(self, positions: Tensor, window: Window) -> Batch:
        """Gather what is read at `positions`, int64 `[n]` on any device."""
        begins = 0 if self.begins is None else _rows(self.begins, positions)
        rows = window.rows(positions - begins)
        present = rows > 0
        if self.begins is not None:
            rows = torch.where(present, rows + _rows(self.begins, positions)[:, None], 0)
        dense = None if self.embeddings is None else _rows(self.embeddings, positions)
        tokens, targets = (_rows(self.ids, places) for places in (positions, positions + 1))
        return Batch(tokens, dense, _rows(self.contexts, rows), present, targets.long())

    def batches(
        self, order: Tensor, size: int, model: ContextKV, shard: Shard | None = None
    ) -> Iterator[Batch]:
        """Gather the positions of `order`, int64 `[n]`, in batches on the model's device."""
        for part in order.to(self.contexts.device).split(size) if len(order) else ():
            rows = part if shard is None else part[shard(len(part))]
            yield self.gather(rows, model.window).to(model.device)

    def epoch(
        self, seed: int, number: int, done: int, size: int, model: ContextKV, shard: Shard
    ) -> Iterator[Batch]:
        """Gather an epoch's batches on the model's device, in an order drawn from (seed, number) alone.

        Args:
            done: positions to leave out, those of the first batches.
            size: positions of a batch; only the last one may have fewer.
        """
        return self.batches(self.epoch_order(seed, number)[done:], size, model, shard)

    def epoch_order(self, seed: int, number: int) -> Tensor:
        """Draw the permutation in which an epoch visits the positions, int64 `[n]` on the CPU."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(epoch_seed(seed, number)))

    def attend(self, model: ContextKV, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute `model.attend` at `positions`: hidden states and attention weights."""
        return self.gather(positions, model.window).to(model.device).attend(model)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def _rows(held: Tensor, rows: Tensor) -> Tensor:
    """Gather rows of a tensor, wherever it is held."""
    return held[rows.to(held.device)]
