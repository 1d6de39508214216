"""Contexts of a stream from a trained ContextBlock: the original's parallel passes, and the exact recurrence.

All functions take the tokens as distinct rows (`distinct_rows`): `token_half` `[num_distinct, context_dim]`
(`ContextBlock.project_tokens` of each distinct token) and `tokens` `[n]`, indices into it; and all make or
overwrite padded contexts `[n + 1, context_dim]`, row 0 zero (see `windows`).
"""

import torch
from torch import Tensor

from ..config import Phase1Config
from ..errors import UserError
from ..model.modeling import ContextBlock, ContextKVForCausalLM

SEGMENT = 256  # tokens of one segment of the exact recurrence
FIRST_BURN_IN = 48  # tokens that a segment reads before its own, at the first try
LAST_BURN_IN = 64 * FIRST_BURN_IN  # a block that needs more is not trained
PASS_ROWS = 16_384  # positions of a parallel pass at a time, to bound its memory


@torch.no_grad()
def distinct_rows(model: ContextKVForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Normed embeddings of the distinct ones of `ids` `[n]`, and `ids` as rows of them, int64 `[n]`.

    Both are where the model is, wherever `ids` are; these are whole numbers of any dtype.
    """
    distinct, tokens = ids.to(model.device, torch.int32).unique(return_inverse=True)
    return model.embed(distinct), tokens


def stream_contexts(
    block: ContextBlock,
    token_half: Tensor,
    tokens: Tensor,
    config: Phase1Config,
    contexts: Tensor,
    trained: bool,
    generator: torch.Generator,
) -> float | None:
    """Overwrite `contexts` with a stream's contexts, made in the way that `config.contexts` names.

    Args:
        contexts: padded; the state at the end of Phase 1 if `trained`, else anything.
        trained: whether Phase 1 was trained on this stream.
        generator: draws the original's first contexts of a stream that it was not trained on.

    Returns:
        if exact, the largest error of any component.
    """
    if config.contexts == "exact":
        return exact_contexts(block, token_half, tokens, config.tolerance, out=contexts)[1]
    if not trained:
        draw_contexts(contexts, config.initial_std, generator)
    for _ in range(1 if trained else config.validation_passes):
        parallel_pass(block, token_half, tokens, contexts)
    return None


def draw_contexts(contexts: Tensor, std: float, generator: torch.Generator) -> None:
    """Overwrite padded contexts with draws from N(0, std)."""
    contexts[0] = 0
    for part in contexts[1:].split(PASS_ROWS):
        part.copy_(torch.empty_like(part, device=generator.device).normal_(std=std, generator=generator))


@torch.no_grad()
def parallel_pass(block: ContextBlock, token_half: Tensor, tokens: Tensor, contexts: Tensor) -> None:
    """Overwrite `contexts`: every position at once, each from what they held for the position before it."""
    before = contexts[:1].to(token_half.device)
    for start in range(0, len(tokens), PASS_ROWS):
        rows = tokens[start : start + PASS_ROWS]
        stop = start + len(rows)
        held = contexts[start + 1 : stop + 1].to(token_half.device)
        previous = torch.cat([before, held[:-1]])
        before = held[-1:].clone()
        contexts[start + 1 : stop + 1] = block(previous, token_half[rows])


@torch.no_grad()
def exact_contexts(
    block: ContextBlock,
    token_half: Tensor,
    tokens: Tensor,
    tolerance: float,
    fresh: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, float]:
    """The contexts that reading the stream token by token gives, within `tolerance`.

    The trained block forgets its start, so the stream is cut into segments that walk in lock-step, each
    reading some tokens before its own from a zero context. The burn-in doubles until every segment starts
    where its predecessor ends.

    Args:
        tolerance: largest difference allowed of any component.
        fresh: bool `[n]`, True where a token begins a conversation that is read from the zero context.
        out: padded contexts to overwrite, on any device; None makes new ones.

    Returns:
        padded contexts (`out`, if given) and the largest difference of any component at a segment's start.

    Raises:
        UserError: the block does not forget its start within `LAST_BURN_IN` tokens.
    """
    contexts = token_half.new_empty(len(tokens) + 1, token_half.shape[-1]) if out is None else out
    burn_in = FIRST_BURN_IN
    while True:
        starts = _walk_segments(block, token_half, tokens, burn_in, fresh, contexts)
        ends = contexts[SEGMENT : len(tokens) : SEGMENT].to(starts.device)  # row i: before token i
        error = (starts[1:] - ends).abs().max().item() if len(ends) else 0.0
        if error <= tolerance:
            return contexts, error
        if burn_in >= LAST_BURN_IN:
            raise UserError(
                f"The ContextBlock does not forget its start: segments still differ by {error:.1e} after a "
                f"burn-in of {burn_in} tokens (tolerance {tolerance:.0e}); train Phase 1 longer, raise "
                "phase1.tolerance, or use phase1.contexts=passes."
            )
        burn_in *= 2


def _walk_segments(
    block: ContextBlock,
    token_half: Tensor,
    tokens: Tensor,
    burn_in: int,
    fresh: Tensor | None,
    contexts: Tensor,
) -> Tensor:
    """Overwrite `contexts`; returns each segment's context just before its first token."""
    count = len(tokens)
    whole = count // SEGMENT
    first = torch.arange(0, count, SEGMENT, device=tokens.device)
    contexts[0] = 0
    walked, tail = contexts[1:].split([whole * SEGMENT, count - whole * SEGMENT])
    walked = walked.view(whole, SEGMENT, contexts.shape[-1])
    state = starts = token_half.new_zeros(len(first), token_half.shape[-1])
    for step in range(-burn_in, SEGMENT):
        position = first + step
        token = position.clamp(0, count - 1)
        if fresh is not None:
            state = state.masked_fill(fresh[token][:, None], 0)
        read = block(state, token_half[tokens[token]])
        state = torch.where((position >= 0)[:, None], read, state)  # nothing to read before the stream
        if step == -1:
            starts = state
        if step >= 0:
            walked[:, step] = state[:whole]
        if 0 <= step < len(tail):
            tail[step] = state[-1]
    return starts
