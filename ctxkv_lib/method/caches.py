"""The caches of Phase 2, contexts and tokens of a stream, and the batches that are gathered from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any, Self

import torch
from torch import Tensor

from .copying import mix
from .model import ContextKV
from .windows import Window

# Of cached contexts and of the matrix products of training, by precision.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Positions that are shuffled together, so that 4 GiB of contexts are read at random, whatever the stream's
# length; and the blocks of consecutive positions that such a pool is made of.
POOL, POOL_BLOCKS = 2**22, 8
MIXED_ROWS = 256  # positions at a time with all their logits

Shard = Callable[[int], slice]  # which of a batch's rows a process takes; see `Loop.shard`


@dataclass(frozen=True)
class _Tensors:
    """A dataclass of tensors, some of which may be None."""

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor in it, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in values.items() if isinstance(tensor, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with `change` of each tensor."""
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
        target_logits, correct = [], []
        for start in range(0, len(self), MIXED_ROWS):
            rows = self.map(itemgetter(slice(start, start + MIXED_ROWS)))
            logits = rows.logits(model)
            target_logits.append(logits.gather(1, rows.targets[:, None])[:, 0])
            correct.append(target_logits[-1] == logits.amax(dim=1))
        return -torch.cat(target_logits), torch.cat(correct)

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device; a GPU copies it from pinned memory, and nothing waits for that."""

        def move(tensor: Tensor) -> Tensor:
            pins = device.type == "cuda" and tensor.device.type == "cpu"
            return (tensor.pin_memory() if pins else tensor).to(device, non_blocking=pins)

        return self.map(move)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch's order and dropout, for any seed within what torch takes."""
    return (seed * 1_000_003 + epoch) % 2**63


@dataclass(frozen=True)
class TokenCache(_Tensors):
    """A cached stream of n + 1 tokens: n inputs, each with its target."""

    ids: Tensor  # int32 `[n + 1]`, the tokens; position i reads token i and predicts token i + 1

    def __len__(self) -> int:
        return len(self.ids) - 1

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def batch(self, positions: Tensor, model: Any) -> Any:
        """Gather what a model without contexts reads at `positions`, int64 `[n]`: `mixer.RowBatch`."""
        return model.gather(self.ids, positions)

    def batches(self, order: Tensor, size: int, model: Any, shard: Shard | None = None) -> Iterator[Any]:
        """Gather the positions of `order`, int64 `[n]`, in batches on the model's device."""
        for positions in order.to(self.ids.device).split(size) if len(order) else ():
            own_positions = positions if shard is None else positions[shard(len(positions))]
            yield self.batch(own_positions, model).to(model.device)

    def epoch_order(self, seed: int, epoch: int, chunk: int = 1) -> Tensor:
        """Draw the order in which an epoch visits the positions, int64 `[n]` on the CPU, from both numbers.

        It is a permutation of all positions; in a stream of more than `POOL`, of blocks, and of the positions
        in each pool of blocks. With a `chunk` of more than one, of chunks, cut differently in each epoch.
        """
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        positions = torch.arange(len(self))
        if chunk > 1:
            shift = int(torch.randint(chunk, (), generator=generator))
            chunks = [positions[:shift], *positions[shift:].split(chunk)]
            return torch.cat([chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()])
        if len(self) <= POOL:
            return torch.randperm(len(self), generator=generator)
        blocks = positions.split(max(1, POOL // POOL_BLOCKS))
        pools = torch.randperm(len(blocks), generator=generator).split(POOL_BLOCKS)
        pooled = [torch.cat([blocks[number] for number in pool.tolist()]) for pool in pools]
        return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for pool in pooled])


@dataclass(frozen=True)
class StreamCache(TokenCache):
    """A cached stream with its contexts, padded (see `windows`): what Phase 2 reads.

    `embeddings` are the published layout; with None the model's own table gives the same rows.
    """

    contexts: Tensor  # float32 or bfloat16 `[n + 1, context_dim]`
    embeddings: Tensor | None = None  # normed, float32 `[n, hidden_size]`

    def gather(self, positions: Tensor, window: Window) -> Batch:
        """Gather what is read at `positions`, int64 `[n]` on any device, without what is copied."""
        rows = window.rows(positions)
        dense = None if self.embeddings is None else _rows(self.embeddings, positions)
        tokens, targets = (_rows(self.ids, places) for places in (positions, positions + 1))
        return Batch(tokens, dense, _rows(self.contexts, rows), rows > 0, targets.long())

    def batch(self, positions: Tensor, model: ContextKV) -> Batch:
        """Gather what `model` reads at `positions`; outside of training also what it copies."""
        batch = self.gather(positions, model.window)
        copies = model.copying and not model.training and len(positions)
        return self._with_copies(batch, positions, model) if copies else batch

    def attend(self, model: ContextKV, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute `model.attend` at `positions`: hidden states and attention weights."""
        return self.gather(positions, model.window).to(model.device).attend(model)

    def _with_copies(self, batch: Batch, positions: Tensor, model: ContextKV) -> Batch:
        """Add what the model copies at each position; runs of consecutive ones are compared together."""
        copying, reach = model.copying, model.window.offsets[-1]
        assert copying is not None
        copied, shares = [], []
        for run in positions.tensor_split((positions.diff() != 1).nonzero()[:, 0].cpu() + 1):
            start, stop = max(0, int(run[0]) - reach), int(run[-1]) + 1
            rows, first = run[None] - start, run.new_zeros(1)
            shares.append(copying.shares(self.contexts[None, start + 1 : stop + 1], rows, first, reach)[0])
            followed = run[:, None] - torch.arange(reach, device=run.device)
            copied.append(_rows(self.ids, followed.clamp(min=0)))
        return replace(batch, copied=torch.cat(copied), shares=torch.cat(shares))


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Gather rows of a tensor on any device."""
    return tensor[rows.to(tensor.device)]
