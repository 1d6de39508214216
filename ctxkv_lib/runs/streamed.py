"""Contexts that Phase 2 computes on demand: one pool of blocks at a time, dropped after training on it.

The context before every `STRIDE`-th token is kept, as many bytes as the ids. From these, all segments of a
pool are computed in lock-step: the exact recurrence, without a burn-in.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ranks
from ..method.caches import Batch, Shard, StreamCache, epoch_seed
from ..method.config import Phase1Config
from ..method.contexts import SCAN_TOKENS, exact_contexts
from ..method.model import ContextKV, project_inputs
from .settings import BLOCK_TOKENS, POOL_BLOCKS, STRIDE

TABLE_ROWS = 8192  # tokens of the vocabulary at a time, to bound the memory of their embeddings


def sampled(ids: Tensor, config: Phase1Config) -> Tensor:
    """Return the tokens that Phase 1 trains on: `ids` `[n]`, or even samples of them
    (`phase1.max_tokens`).
    """
    most, size = config.max_tokens, config.batch_size
    if len(ids) <= most or config.context_method == "passes":
        return ids
    count = max(1, most // size)
    gap = (len(ids) - min(size, most)) / max(1, count - 1)
    return torch.cat([ids[int(number * gap) :][: min(size, most)] for number in range(count)])


@torch.no_grad()
def project_vocabulary(model: ContextKV) -> Tensor:
    """Compute the ContextBlock's `project_inputs` of the whole vocabulary, `[vocab_size, ...]`."""
    every = torch.arange(model.wte.num_embeddings, device=model.device)
    return torch.cat(
        [project_inputs(model.context_block, model.embed(part)) for part in every.split(TABLE_ROWS)]
    )


@torch.no_grad()
def read_once(model: ContextKV, ids: Tensor, tolerance: float, beginning: Tensor) -> tuple[Tensor, float]:
    """Read a stream of n + 1 tokens once, a block at a time, and keep the contexts that `Streamed` needs.

    Args:
        ids: integers `[n + 1]`, on any device.
        tolerance: as in `exact_contexts`.
        beginning: padded contexts of the first positions, float32; overwritten.

    Returns:
        the context before every `STRIDE`-th token, float32 `[n // STRIDE + 1, context_dim]` on the CPU; and
        the largest difference of a component at a segment boundary.
    """
    inputs, count, most = project_vocabulary(model), len(ids) - 1, 0.0
    width = beginning.shape[1]
    starts = torch.empty(count // STRIDE + 1, width)
    before = inputs.new_zeros(width)
    for first in range(0, count, SCAN_TOKENS):
        tokens = ids[first : min(first + SCAN_TOKENS, count)]
        contexts, error = exact_contexts(model.context_block, inputs, tokens, tolerance, before=before)
        most, before = max(most, error), contexts[-1].clone()
        kept = contexts[::STRIDE]
        starts[first // STRIDE :][: len(kept)] = kept
        rows = beginning[first : first + len(contexts)]  # none behind its end
        rows.copy_(contexts[: len(rows)])
    return starts, most


@dataclass
class Streamed:
    """The `TrainingStream` of a long stream of n + 1 tokens.

    Each epoch shuffles the blocks, and then the positions within each pool of blocks.

    Attributes:
        ids: integers `[n + 1]`, on any device.
        starts: float32 `[n // STRIDE + 1, context_dim]`, as `read_once` left them, on any device.
        inputs: `project_vocabulary`.
        dtype: of the contexts in a pool, float32 or bfloat16.
    """

    ids: Tensor
    starts: Tensor
    inputs: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.ids) - 1

    def epoch(
        self, seed: int, number: int, done: int, size: int, model: ContextKV, shard: Shard
    ) -> Iterator[Batch]:
        """Yield batches as `TrainingStream` does; the stream's end, maybe a short block, comes last."""
        generator = torch.Generator().manual_seed(epoch_seed(seed, number))
        for pool in self._pools(size, generator):
            count = sum(map(len, pool))
            order = torch.randperm(count, generator=generator)
            if done < count:
                cache, positions = self._made(pool, model)
                yield from cache.batches(positions[order[done:]], size, model, shard)
                del cache  # before the next one is made
            done = max(0, done - count)

    def _pools(self, size: int, generator: torch.Generator) -> list[list[range]]:
        """Draw the order of all blocks in an epoch, `POOL_BLOCKS` at a time."""
        length, count = size * max(1, BLOCK_TOKENS // size), len(self)
        *whole, last = [range(first, min(first + length, count)) for first in range(0, count, length)]
        order = torch.randperm(len(whole), generator=generator).tolist()
        blocks = [*(whole[place] for place in order), last]
        return [blocks[first : first + POOL_BLOCKS] for first in range(0, len(blocks), POOL_BLOCKS)]

    def _made(self, pool: list[range], model: ContextKV) -> tuple[StreamCache, Tensor]:
        """Compute tokens and contexts of a pool on the model's device, and its blocks' positions in it.

        Each block is a stream of its own, preceded by the tokens that its first windows reach.
        """
        reach = model.window.offsets[-1] + 1
        ids, starts, begins, positions = [], [], [], []
        place = 0  # of the next segment
        for block in pool:
            segments = range(max(0, block.start - reach) // STRIDE, block.stop // STRIDE + 1)
            shift = (place - segments.start) * STRIDE  # from a position of the stream to one of the pool
            origin = segments.start * STRIDE
            tokens = self.ids[segments.start * STRIDE : segments.stop * STRIDE].int()
            ids.append(F.pad(tokens, (0, len(segments) * STRIDE - len(tokens))))
            starts.append(self.starts[segments.start : segments.stop])
            begins.append(torch.full((len(segments) * STRIDE,), origin + shift))
            positions.append(torch.arange(block.start, block.stop) + shift)
            place += len(segments)
        tokens = F.pad(torch.cat(ids), (0, 1)).to(model.device)
        contexts = self._contexts(tokens[:-1].view(place, STRIDE), torch.cat(starts).to(model.device), model)
        cache = StreamCache(tokens, contexts, begins=torch.cat(begins).to(model.device))
        return cache, torch.cat(positions)

    @torch.no_grad()
    def _contexts(self, tokens: Tensor, starts: Tensor, model: ContextKV) -> Tensor:
        """Compute padded contexts of segments `[s, STRIDE]`, each from the context before it.

        Each of several processes computes a shard.
        """
        count, stride = tokens.shape
        contexts = torch.empty(count * stride + 1, starts.shape[1], dtype=self.dtype, device=model.device)
        contexts[0] = 0
        made, ours = contexts[1:].view(count, stride, -1), ranks.shard(count)
        state, block = starts[ours], model.context_block.eval()  # whatever is trained beside it
        for step in range(stride):
            state = block(state, self.inputs[tokens[ours, step].long()])
            made[ours, step] = state
        ranks.broadcast([made[part] for part in ranks.shards(count)])
        return contexts
