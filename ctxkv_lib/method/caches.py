"""The caches of Phase 2, contexts and embeddings of a stream, and the batches that are gathered from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Self

import torch
from torch import Tensor

from .copying import mix
from .model import ContextKV
from .windows import Window

POOL_BLOCKS = 8  # blocks of consecutive positions that a pool is made of
MIXED_ROWS = 256  # positions at a time with all their logits

Shard = Callable[[int], slice]  # which of a batch's rows a process takes; see `Loop.shard`


@dataclass(frozen=True)
class _Tensors:
    """A dataclass of tensors, some of which may be None."""

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor it holds, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with each of its tensors changed."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class Batch(_Tensors):
    """What Phase 2 reads at n positions of a stream."""

    tokens: Tensor  # the current ones, int32 `[n]`
    embeddings: Tensor | None  # theirs, normed, float32 `[n, hidden_size]`; None: gathered from the table
    window: Tensor  # contexts that each position sees, `[n, slots, context_dim]`, zero where there is none
    present: Tensor  # the slots that hold a context, bool `[n, slots]`
    targets: Tensor  # the next tokens, int64 `[n]`
    copied: Tensor | None = None  # with `shares`, what `copying.mix` takes; None if nothing is copied
    shares: Tensor | None = None  # both `[n, reach]`

    def __len__(self) -> int:
        return len(self.targets)

    def attend(self, model: ContextKV) -> tuple[Tensor, Tensor | None]:
        """Compute `model.attend` at these positions: hidden states and attention weights."""
        embeddings = model.embed(self.tokens) if self.embeddings is None else self.embeddings
        return model.attend(embeddings, self.window, self.present)

    def logits(self, model: ContextKV) -> Tensor:
        """Compute the logits at these positions, `[n, vocab_size]`."""
        logits = model.logits(self.attend(model)[0], self.tokens)
        if self.copied is not None and self.shares is not None:
            logits = mix(logits, self.copied, self.shares)
        return logits

    def scores(self, model: ContextKV) -> tuple[Tensor, Tensor]:
        """Compute loss in nats and correctness of each prediction: float32 and bool `[n]`."""
        if self.shares is None:
            return model.losses(self.attend(model)[0], self.tokens, self.targets)
        own, correct = [], []
        for start in range(0, len(self), MIXED_ROWS):
            part = self.each(itemgetter(slice(start, start + MIXED_ROWS)))
            logits = part.logits(model)
            own.append(logits.gather(1, part.targets[:, None])[:, 0])
            correct.append(own[-1] == logits.amax(dim=1))
        return -torch.cat(own), torch.cat(correct)

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device; a GPU copies it from pinned memory, and nothing waits for that."""

        def move(tensor: Tensor) -> Tensor:
            pins = device.type == "cuda" and tensor.device.type == "cpu"
            return (tensor.pin_memory() if pins else tensor).to(device, non_blocking=pins)

        return self.each(move)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch's order and dropout, for any seed within what torch takes."""
    return (seed * 1_000_003 + epoch) % 2**63


@dataclass(frozen=True)
class StreamCache(_Tensors):
    """What Phase 2 reads of one stream of n + 1 tokens: n inputs, each with its target.

    `contexts` are float32 or bfloat16, as are the matrix products of training, and padded (see `windows`).
    `embeddings` are the published layout; with None the model's own table gives the same rows.
    """

    ids: Tensor  # int32 `[n + 1]`, the tokens; position i reads token i and predicts token i + 1
    contexts: Tensor  # `[n + 1, context_dim]`
    embeddings: Tensor | None = None  # normed, float32 `[n, hidden_size]`
    pool: int | None = None  # positions visited in one order, as many as memory holds; None: all

    def __len__(self) -> int:
        return len(self.ids) - 1

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def gather(self, positions: Tensor, window: Window) -> Batch:
        """Gather what is read at `positions`, int64 `[n]` on any device."""
        rows = window.rows(positions)
        dense = None if self.embeddings is None else _rows(self.embeddings, positions)
        tokens, targets = (_rows(self.ids, places) for places in (positions, positions + 1))
        return Batch(tokens, dense, _rows(self.contexts, rows), rows > 0, targets.long())

    def batches(
        self, order: Tensor, size: int, model: ContextKV, shard: Shard | None = None
    ) -> Iterator[Batch]:
        """Gather the positions of `order`, int64 `[n]`, in batches on the model's device.

        Where `model` is in evaluation mode and copies, they hold what it copies.
        """
        for part in order.to(self.contexts.device).split(size) if len(order) else ():
            rows = part if shard is None else part[shard(len(part))]
            batch = self.gather(rows, model.window)
            if model.copying and not model.training and len(rows):
                batch = self._with_copies(batch, rows, model)
            yield batch.to(model.device)

    def epoch_order(self, seed: int, number: int) -> Tensor:
        """Draw the order in which an epoch visits the positions, int64 `[n]` on the CPU, from both numbers.

        It is a permutation of all; or of blocks, and of the positions in each `pool` of blocks.
        """
        generator = torch.Generator().manual_seed(epoch_seed(seed, number))
        if self.pool is None or self.pool >= len(self):
            return torch.randperm(len(self), generator=generator)
        blocks = torch.arange(len(self)).split(max(1, self.pool // POOL_BLOCKS))
        places = torch.randperm(len(blocks), generator=generator).split(POOL_BLOCKS)
        pools = [torch.cat([blocks[place] for place in some]) for some in places]
        return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for pool in pools])

    def attend(self, model: ContextKV, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute `model.attend` at `positions`: hidden states and attention weights."""
        return self.gather(positions, model.window).to(model.device).attend(model)

    def _with_copies(self, batch: Batch, positions: Tensor, model: ContextKV) -> Batch:
        """Add what the model copies at each position; runs of consecutive ones are compared together."""
        copying, reach, found = model.copying, model.window.offsets[-1], []
        assert copying is not None
        for run in positions.tensor_split((positions.diff() != 1).nonzero()[:, 0].cpu() + 1):
            start, stop = max(0, int(run[0]) - reach), int(run[-1]) + 1
            rows, first = run[None] - start, run.new_zeros(1)
            shares = copying.shares(self.contexts[None, start + 1 : stop + 1], rows, first, reach)[0]
            followed = run[:, None] - torch.arange(reach, device=run.device)
            found.append((_rows(self.ids, followed.clamp(min=0)), shares))
        copied, all_shares = zip(*found, strict=True)
        return replace(batch, copied=torch.cat(copied), shares=torch.cat(all_shares))


def _rows(held: Tensor, rows: Tensor) -> Tensor:
    """Gather rows of a tensor, wherever it is held."""
    return held[rows.to(held.device)]
