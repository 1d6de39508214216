"""Compute a stream's contexts by parallel passes, as published, or by the exact recurrence.

`tokens`, int64 `[n]`, are row numbers in the list of distinct tokens (see `distinct_rows`).
`projected_inputs`, `[num_distinct, context_dim]`, has one row per distinct token. Contexts are padded:
`[n + 1, context_dim]`. Row 0 is the context before the first token, and row i + 1 is the context after
token i.

`runs.contexts` computes the contexts of every text with one of the two methods. `reference` computes unpadded
contexts in plain code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Phase1Config

PASS_ROWS = 2**14  # contexts per chunk in a parallel pass
SEGMENTS = 256  # maximum number of segments per stream
# Minimum segment length in tokens. Most trained blocks forget the context that they started from within one
# segment, so one round is usually enough to compute the end of a segment correctly.
SEGMENT = 128
ROUNDS = 8  # maximum number of lock-step rounds; after that, finishing token by token is cheaper
# Two contexts at a segment boundary agree if they differ by at most this share of the tolerance. The share is
# below 1 because differences at several boundaries may add up.
AGREEMENT = 1 / 4


@torch.no_grad()
def distinct_rows(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embed the distinct tokens in `ids`, an integer tensor `[n]` of any dtype and on any device.

    Returns the normed embeddings of the distinct tokens, `[num_distinct, hidden_size]`, and the row of each
    id in these embeddings, int64 `[n]`. Both tensors are on the model's device.
    """
    distinct, tokens = ids.to(model.device, torch.int32).unique(return_inverse=True)
    return model.embed(distinct), tokens


def contexts_by_passes(
    block: nn.Module,
    projected_inputs: Tensor,
    tokens: Tensor,
    context_dim: int,
    config: Phase1Config,
    generator: torch.Generator,
    trained_on: Tensor | None = None,
) -> Tensor:
    """Compute the padded contexts of a stream by parallel passes, as published.

    If Phase 1 was trained on this stream, pass the contexts of the last iteration as `trained_on`; one pass
    overwrites them. Otherwise `generator` draws initial contexts for `config.validation_passes` passes.
    """
    if trained_on is not None:
        return parallel_pass(block, projected_inputs, tokens, trained_on)
    contexts = draw_contexts(len(tokens), context_dim, config.initial_std, generator)
    for _ in range(config.validation_passes):
        contexts = parallel_pass(block, projected_inputs, tokens, contexts)
    return contexts


def draw_contexts(count: int, width: int, std: float, generator: torch.Generator) -> Tensor:
    """Draw padded contexts `[count + 1, width]` from N(0, std) for `count` tokens; row 0 is zero."""
    contexts = torch.zeros(count + 1, width, device=generator.device)
    contexts[1:].normal_(std=std, generator=generator)
    return contexts


@torch.no_grad()
def parallel_pass(block: nn.Module, projected_inputs: Tensor, tokens: Tensor, contexts: Tensor) -> Tensor:
    """Apply one step of the block to all contexts in place, and return the contexts.

    The new context of a token is computed from the old context of the token before it.
    """
    before = contexts[:1].clone()  # the old context just before the next part
    for part, rows in zip(contexts[1:].split(PASS_ROWS), tokens.split(PASS_ROWS), strict=True):
        previous = torch.cat([before, part[:-1]])
        before = part[-1:].clone()
        part.copy_(block(previous, projected_inputs[rows]))
    return contexts


@torch.no_grad()
def exact_contexts(
    block: nn.Module, projected_inputs: Tensor, tokens: Tensor, before: Tensor, tolerance: float
) -> Tensor:
    """Compute the padded contexts that reading the stream token by token would give.

    The stream is cut into segments, which are computed in lock-step. In the first round every segment starts
    from zeros. In later rounds, each segment whose start differs from the end of the previous segment is
    recomputed from that end. After round k, the first k segments are final: the first segment starts
    correctly, and each later segment is final at most one round after the segment before it. So the loop
    always ends. If the block forgets its start within a segment, two rounds are enough. After `ROUNDS`
    rounds, each round computes only the first unfinished segment, so the remaining tokens are read one by
    one. The result has the dtype and device of `before`.

    Args:
        before: context before the first token, `[context_dim]`: zeros at the start of a stream. To read a
            long stream in parts, pass the last context of the previous part.
        tolerance: target error per component. The actual error may be larger: a segment may start with an
            error of a quarter of the tolerance, and a block may amplify this error before it fades.
    """
    length = max(1, min(len(tokens), SEGMENT), -(-len(tokens) // SEGMENTS))
    rows = F.pad(tokens, (0, -len(tokens) % length)).view(-1, length)  # (segments, length)
    starts = before.new_zeros(len(rows), len(before))
    starts[:1] = before
    contexts = before.new_empty(1 + rows.numel(), len(before))
    contexts[0] = before
    segments = contexts[1:].view(*rows.shape, len(before))  # (segments, length, context_dim)
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
