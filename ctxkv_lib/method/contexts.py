"""Contexts of a stream: by the original's parallel passes, or by the exact recurrence.

Tokens are indices `tokens` `[n]` into the distinct ones (`distinct_rows`), whose input projections are
`projected_inputs` `[num_distinct, context_dim]`. Contexts are padded, `[n + 1, context_dim]`: row 0 is the
context before the first token, row i + 1 the context after token i.

These functions compute the caches, the test split and other text: `runs.stages._stream_contexts` calls one of
the two methods. Only four other places call a block. `oacd.train_iteration` computes contexts in training
(also for `report.times`), `modeling` in a saved model, `runs.generation` after each new token, and
`plugins.checks` one step of a user's block. `reference` computes all contexts in plain lines, unpadded.
Notebooks 0 and 2 and the study's `plugins.py` have loops of their own; notebook 0 and the study's `probe.py`
call `exact_contexts`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .block import Block
from .config import Phase1Config

PASS_ROWS = 2**14  # contexts of a parallel pass at a time
SEGMENTS = 256  # of a stream at most, computed in lock-step
SEGMENT = 128  # tokens of one at least: most trained blocks forget within one, and its end is right at once
ROUNDS = 8  # of lock-step; what a block has not forgotten by then is cheaper to read token by token
AGREEMENT = 1 / 4  # of the tolerance: differences at several boundaries may add up


@torch.no_grad()
def distinct_rows(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embed the distinct ones of `ids`, integers `[n]` of any dtype, on any device.

    Returns normed embeddings `[num_distinct, hidden_size]`, and `ids` as rows of them, int64 `[n]`, both on
    the model's device.
    """
    distinct, tokens = ids.to(model.device, torch.int32).unique(return_inverse=True)
    return model.embed(distinct), tokens


def contexts_by_passes(
    block: Block,
    projected_inputs: Tensor,
    tokens: Tensor,
    config: Phase1Config,
    generator: torch.Generator,
    trained_on: Tensor | None = None,
) -> Tensor:
    """Compute the padded contexts of a stream as the original does.

    `trained_on`, which is overwritten, has those of Phase 1's last iteration, if it was trained on this
    stream; else `generator` draws the first ones.
    """
    if trained_on is not None:
        return parallel_pass(block, projected_inputs, tokens, trained_on)
    contexts = draw_contexts(len(tokens), block.context_dim, config.initial_std, generator)
    for _ in range(config.validation_passes):
        contexts = parallel_pass(block, projected_inputs, tokens, contexts)
    return contexts


def draw_contexts(count: int, width: int, std: float, generator: torch.Generator) -> Tensor:
    """Draw padded contexts of `count` tokens from N(0, std), `[count + 1, width]`; row 0 is zeros."""
    contexts = torch.zeros(count + 1, width, device=generator.device)
    contexts[1:].normal_(std=std, generator=generator)
    return contexts


@torch.no_grad()
def parallel_pass(block: Block, projected_inputs: Tensor, tokens: Tensor, contexts: Tensor) -> Tensor:
    """Overwrite every context by one step from the context that was before it, all at once; return them."""
    before = contexts[:1].clone()  # of the part that is next, as it was
    for part, rows in zip(contexts[1:].split(PASS_ROWS), tokens.split(PASS_ROWS), strict=True):
        previous = torch.cat([before, part[:-1]])
        before = part[-1:].clone()
        part.copy_(block(previous, projected_inputs[rows]))
    return contexts


@torch.no_grad()
def exact_contexts(
    block: Block, projected_inputs: Tensor, tokens: Tensor, tolerance: float, before: Tensor | None = None
) -> Tensor:
    """Compute the padded contexts of the recurrence, as reading token by token gives them.

    The stream is cut into segments, which are computed in lock-step: in the first round each from zeros, in
    the others each whose predecessor has ended elsewhere than it began, from there. The invariant: after
    round k the first k segments are final, since the first begins right, and each other one after its
    predecessor is. So the rounds end; a block that forgets within a segment takes two. After `ROUNDS` rounds
    only the first segment that is not final is computed, which reads the rest token by token. The result has
    the dtype and device of `projected_inputs`.

    Args:
        tolerance: target error of a component, not a bound: where a segment begins, a quarter of it may be
            left, and a block may amplify that before it forgets it.
        before: context before the first token, `[context_dim]`; None: zeros. A long stream can be read part
            by part, each from the last context of the one before.
    """
    first = projected_inputs.new_zeros(block.context_dim) if before is None else before
    length = max(1, min(len(tokens), SEGMENT), -(-len(tokens) // SEGMENTS))
    rows = F.pad(tokens, (0, -len(tokens) % length)).view(-1, length)  # (segments, length)
    starts = first.new_zeros(len(rows), len(first))
    starts[:1] = first
    contexts = first.new_empty(1 + rows.numel(), len(first))
    contexts[0] = first
    segments = contexts[1:].view(*rows.shape, len(first))  # (segments, length, context_dim)
    unfinished, rounds = torch.arange(len(rows), device=rows.device), 0
    while len(unfinished):
        state = starts[unfinished]
        for step, column in enumerate(rows[unfinished].T):
            state = block(state, projected_inputs[column])
            segments[unfinished, step] = state
        ends = segments[:-1, -1]
        agrees = torch.isclose(ends, starts[1:], rtol=0, atol=AGREEMENT * tolerance, equal_nan=True)
        unfinished, rounds = 1 + (~agrees.all(dim=1)).nonzero()[:, 0], rounds + 1
        if rounds >= ROUNDS:
            unfinished = unfinished[:1]
        starts[unfinished] = ends[unfinished - 1]
    return contexts[: len(tokens) + 1]
