"""Segmented scan: the exact recurrence of a ContextBlock, many segments of a stream in lock-step.

Contexts are padded here: row i is the context before token i, row i + 1 the context after it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT = 128  # tokens of a segment, at least; most trained blocks forget within one
# Segments at most. On a CPU a step on more rows costs more; a GPU is not busy with fewer.
CPU_SEGMENTS, GPU_SEGMENTS = 256, 2048
CHECK_EVERY = 16  # tokens between two comparisons, each of which waits for the GPU
AGREEMENT = 1 / 4  # of the tolerance: differences at several boundaries may add up
THINNING = 4  # segments that become one if the block remembers more than a segment

# Next contexts `[m, context_dim]`, from the contexts and the input projections of m tokens.
Block = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stream:
    """Tokens and the block that reads them.

    Attributes:
        projected_inputs: input projections of the distinct tokens, `[num_distinct, context_dim]`.
        tokens: int64 `[n]`, rows of `projected_inputs`.
        begins: int64 `[n]`, -1 or, where a token begins a new sequence, the row of `initial` that it starts
            from; None if the stream is one sequence.
        initial: contexts `[any, context_dim]`.
    """

    block: Block
    projected_inputs: Tensor
    tokens: Tensor
    begins: Tensor | None = None
    initial: Tensor | None = None

    def read(self, contexts: Tensor, positions: Tensor) -> Tensor:
        """Compute `count` steps of m segments in lock-step.

        Args:
            contexts: before the first step, `[m, context_dim]`.
            positions: int64 `[count, m]`, those of a column one after another.

        Returns:
            contexts after each token, `[count, m, context_dim]`.
        """
        outputs, starts = [], []
        if self.begins is not None and self.initial is not None:
            rows = self.begins[positions]
            starts = [*zip((rows >= 0)[..., None], self.initial[rows.clamp(min=0)], strict=True)]
        for step, inputs in enumerate(self.projected_inputs[self.tokens[positions]]):
            contexts = self.block(torch.where(*starts[step], contexts) if starts else contexts, inputs)
            outputs.append(contexts)
        return torch.stack(outputs)


@torch.no_grad()
def segmented_scan(stream: Stream, contexts: Tensor, tolerance: float) -> float:
    """Overwrite `contexts[1:]` with the recurrence that starts from `contexts[0]`.

    1. Cut the stream into segments and compute all in lock-step. Each starts from `contexts[0]`, which is a
       guess for all but the first.
    2. If a segment ends with another context than the next one started from, the next one started wrong.
       Compute all such segments again, from the context before each, until they agree with what is there.
    3. Repeat this until all agree. If most segments of a round do not, the block remembers more than a
       segment: the next round computes every fourth one only, and on through the three after it.

    The first segment of each round starts right, so the rounds end. If the block never forgets, the last
    round is one segment: the whole stream, token by token.

    Args:
        contexts: padded, `[n + 1, context_dim]`, of the dtype and on the device of `stream.projected_inputs`.
        tolerance: largest error of a component to aim at. At segment boundaries a quarter of it may be left,
            which a block may amplify before it forgets it.

    Returns:
        the largest difference of a component that is left at a segment boundary.
    """
    contexts[1:] = torch.nan  # agrees with nothing
    count = len(contexts) - 1
    most = CPU_SEGMENTS if contexts.device.type == "cpu" else GPU_SEGMENTS
    pending = torch.arange(0, count, max(SEGMENT, -(-count // most)), device=contexts.device)
    contexts[pending] = contexts[0].clone()
    largest, rounds, thinning = 0.0, 0, 1
    while len(pending):
        starts = pending[::thinning].contiguous()
        ends = torch.cat([starts[1:], starts.new_tensor([count])])
        stops, differences = _compute(stream, contexts, starts, ends, AGREEMENT * tolerance)
        agrees = differences <= AGREEMENT * tolerance
        largest = max([largest, *differences[agrees].tolist()])
        rounds += 1
        thinning = 1 if rounds == 1 or agrees.float().mean() >= 0.5 else THINNING
        not_reached = pending >= stops[torch.searchsorted(starts, pending, right=True) - 1]
        pending = torch.cat([pending[not_reached], ends[:-1][~agrees[:-1]]]).sort().values
    return largest


def _compute(
    stream: Stream, contexts: Tensor, starts: Tensor, ends: Tensor, agreement: float
) -> tuple[Tensor, Tensor]:
    """Overwrite the contexts of segments in lock-step, each until it agrees with what is there.

    Args:
        starts: position of each segment's first token, `[m]`.
        ends: position after its last token, `[m]`.
        agreement: largest difference of a component from what is there at which a segment stops.

    Returns:
        position after the last token computed of each segment, and the largest difference there, both `[m]`.
    """
    stops, differences = starts.clone(), contexts.new_empty(len(starts))
    active, state = torch.arange(len(starts), device=starts.device), contexts[starts]
    while len(active):
        count = min(CHECK_EVERY, int((ends - stops)[active].min()))
        ahead = stops[active] + torch.arange(count, device=starts.device)[:, None]  # (count, active)
        computed = stream.read(state, ahead)
        stops[active] += count
        differences[active] = (computed[-1] - contexts[stops[active]]).abs().amax(dim=1)
        contexts[ahead + 1] = computed
        goes_on = ~(differences <= agreement)[active] & (stops < ends)[active]
        active, state = active[goes_on], computed[-1, goes_on]
    return stops, differences
