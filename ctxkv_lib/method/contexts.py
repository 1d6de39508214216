"""Contexts of a stream: by the original's parallel passes, or by the exact recurrence.

Tokens are indices `tokens` `[n]` into the distinct ones (`distinct_rows`), whose input projections are
`projected_inputs` `[num_distinct, context_dim]`. Contexts are padded, `[n + 1, context_dim]`: row 0 is the
context before the first token, row i + 1 the context after token i.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import Phase1Config

PASS_ROWS = 2**14  # contexts of a parallel pass at a time
SCAN_TOKENS = 2**18  # tokens of one segmented scan, which bounds the memory of its contexts: 256 MiB
SEGMENT = 128  # tokens of a segment, at least; most trained blocks forget within one
# Segments at most. On a CPU a step on more rows costs more; a GPU is not busy with fewer.
CPU_SEGMENTS, GPU_SEGMENTS = 256, 2048
CHECK_EVERY = 16  # tokens between two comparisons, each of which waits for the GPU
AGREEMENT = 1 / 4  # of the tolerance: differences at several boundaries may add up
THINNING = 4  # segments that become one if the block remembers more than a segment

# Next contexts `[m, context_dim]`, from the contexts and the input projections of m tokens.
Block = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def distinct_rows(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embed the distinct tokens of a stream.

    Args:
        model: has a `device` and an `embed` that maps ids to normed embeddings.
        ids: integers `[n]` of any dtype, on any device.

    Returns:
        normed embeddings `[num_distinct, hidden_size]`, and `ids` as rows of them, int64 `[n]`, both on the
        model's device.
    """
    distinct, tokens = ids.to(model.device, torch.int32).unique(return_inverse=True)
    return model.embed(distinct), tokens


def stream_contexts(
    block: Block,
    projected_inputs: Tensor,
    tokens: Tensor,
    config: Phase1Config,
    contexts: Tensor,
    trained: bool,
    generator: torch.Generator,
) -> float | None:
    """Overwrite `contexts` with those of a stream, computed as `config.context_method` says.

    Args:
        contexts: padded; if `trained`, those of Phase 1's last iteration, else anything.
        trained: whether Phase 1 was trained on this stream.
        generator: draws the first contexts of parallel passes over a stream that Phase 1 was not trained on.

    Returns:
        the error of `exact_contexts`; None of parallel passes.
    """
    if config.context_method == "exact":
        return exact_contexts(block, projected_inputs, tokens, config.tolerance, out=contexts)[1]
    if not trained:
        draw_contexts(contexts, config.initial_std, generator)
    for _ in range(1 if trained else config.validation_passes):
        parallel_pass(block, projected_inputs, tokens, contexts)
    return None


def draw_contexts(
    contexts: Tensor,
    std: float,
    generator: torch.Generator,
    release: Callable[[Tensor], None] = lambda contexts: None,
) -> None:
    """Overwrite padded contexts with draws from N(0, std), row 0 with zeros; `release` as of `Loop`."""
    contexts[0] = 0
    for chunk in contexts[1:].split(PASS_ROWS):
        drawn = torch.empty(chunk.shape, device=generator.device)
        chunk.copy_(drawn.normal_(std=std, generator=generator))
        release(contexts)


@torch.no_grad()
def parallel_pass(block: Block, projected_inputs: Tensor, tokens: Tensor, contexts: Tensor) -> None:
    """Overwrite every context by one step from the context that was before it, all at once."""
    last = contexts[:1].to(projected_inputs.device)
    for chunk, rows in zip(contexts[1:].split(PASS_ROWS), tokens.split(PASS_ROWS), strict=True):
        held = chunk.to(projected_inputs.device)
        previous = torch.cat([last, held[:-1]])
        last = held[-1:].clone()
        chunk.copy_(block(previous, projected_inputs[rows]))


@torch.no_grad()
def exact_contexts(
    block: Block,
    projected_inputs: Tensor,
    tokens: Tensor,
    tolerance: float,
    is_first: Tensor | None = None,
    out: Tensor | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Compute the contexts of the recurrence, as reading token by token gives them.

    Args:
        tokens: any integers `[n]`, on any device.
        tolerance: largest error of a component (see `segmented_scan`).
        is_first: bool `[n]`, True at a conversation's first token, which starts from the zero context.
        out: padded contexts to overwrite, of any dtype and on any device; None makes new ones.
        before: context before the first token, `[context_dim]`; None: the zero context. Without `out` and
            `before`, contexts are as wide as `projected_inputs`.

    Returns:
        padded contexts (`out`, if given), and the largest difference of a component that is left at a segment
        boundary.
    """
    width = next(each.shape[-1] for each in (out, before, projected_inputs) if each is not None)
    contexts = projected_inputs.new_empty(len(tokens) + 1, width) if out is None else out
    state = projected_inputs.new_zeros(width) if before is None else before
    contexts[0] = state
    error = 0.0
    for start in range(0, len(tokens), SCAN_TOKENS):
        chunk = slice(start, start + SCAN_TOKENS)
        rows = tokens[chunk].to(projected_inputs.device, torch.int64)
        begins = None if is_first is None else is_first[chunk].to(rows) - 1
        place = contexts[start : start + SCAN_TOKENS + 1]
        made = place.to(projected_inputs)  # the same tensor, where nothing has to be changed
        made[0] = state
        stream = Stream(block, projected_inputs, rows, begins, projected_inputs.new_zeros(1, width))
        error = max(error, segmented_scan(stream, made, tolerance))
        place.copy_(made)  # nothing, if it is the same tensor
        state = made[-1].clone()
    return contexts, error


@dataclass(frozen=True)
class Stream:
    """Tokens for a segmented scan, and the block that reads them.

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
        stops, differences = _scan_segments(stream, contexts, starts, ends, AGREEMENT * tolerance)
        agrees = differences <= AGREEMENT * tolerance
        largest = max([largest, *differences[agrees].tolist()])
        rounds += 1
        thinning = 1 if rounds == 1 or agrees.float().mean() >= 0.5 else THINNING
        not_reached = pending >= stops[torch.searchsorted(starts, pending, right=True) - 1]
        pending = torch.cat([pending[not_reached], ends[:-1][~agrees[:-1]]]).sort().values
    return largest


def _scan_segments(
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
        computed, begins = [], None if stream.begins is None else stream.begins[ahead]
        for step, inputs in enumerate(stream.projected_inputs[stream.tokens[ahead]]):
            if begins is not None and stream.initial is not None:
                initial = stream.initial[begins[step].clamp(min=0)]
                state = torch.where(begins[step, :, None] >= 0, initial, state)
            state = stream.block(state, inputs)
            computed.append(state)
        stops[active] += count
        differences[active] = (state - contexts[stops[active]]).abs().amax(dim=1)
        contexts[ahead + 1] = torch.stack(computed)
        goes_on = ~(differences <= agreement)[active] & (stops < ends)[active]
        active, state = active[goes_on], state[goes_on]
    return stops, differences
