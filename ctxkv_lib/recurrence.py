"""Contexts of a stream from a trained ContextBlock: the seed's parallel passes, and the exact recurrence.

All functions take the tokens as distinct rows: `token_half` `[num_distinct, context_dim]`
(`ContextBlock.project_tokens` of each distinct token) and `tokens` `[n]`, indices into it; and all return
padded contexts `[n + 1, context_dim]`, row 0 zero (see `windows`).
"""

import torch
from torch import Tensor

from .config import Phase1Config
from .errors import UserError
from .modeling import ContextBlock

SEGMENT = 256  # tokens of one segment of the exact recurrence
FIRST_BURN_IN = 48  # tokens that a segment reads before its own, at the first try
LAST_BURN_IN = 64 * FIRST_BURN_IN  # a block that needs more is not trained
PASS_ROWS = 16_384  # positions of a parallel pass at a time, to bound its memory


def stream_contexts(
    block: ContextBlock,
    token_half: Tensor,
    tokens: Tensor,
    config: Phase1Config,
    state: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor, float | None]:
    """Contexts of a stream in the way that `config.contexts` names.

    Args:
        state: the stream's contexts at the end of Phase 1, padded; None for a stream it did not train on.
        generator: draws the seed's first contexts of such a stream.

    Returns:
        padded contexts and, if exact, the largest error of any component.
    """
    if config.contexts == "exact":
        return exact_contexts(block, token_half, tokens, config.tolerance)
    if state is not None:
        return parallel_pass(block, token_half, tokens, state), None
    contexts = padded_noise(len(tokens), block.norm.weight, config.initial_std, generator)
    for _ in range(config.validation_passes):
        contexts = parallel_pass(block, token_half, tokens, contexts)
    return contexts, None


def padded_noise(count: int, like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Padded contexts drawn from N(0, std)."""
    contexts = like.new_zeros(count + 1, like.shape[-1])
    contexts[1:].normal_(std=std, generator=generator)
    return contexts


@torch.no_grad()
def parallel_pass(block: ContextBlock, token_half: Tensor, tokens: Tensor, contexts: Tensor) -> Tensor:
    """Every position at once, each from the context that `contexts` holds for the position before it."""
    updated = torch.zeros_like(contexts)
    for start in range(0, len(tokens), PASS_ROWS):
        rows = tokens[start : start + PASS_ROWS]
        stop = start + len(rows)
        updated[start + 1 : stop + 1] = block(contexts[start:stop], token_half[rows])
    return updated


@torch.no_grad()
def exact_contexts(
    block: ContextBlock, token_half: Tensor, tokens: Tensor, tolerance: float, fresh: Tensor | None = None
) -> tuple[Tensor, float]:
    """The contexts that reading the stream token by token gives, within `tolerance`.

    The trained block forgets its start, so the stream is cut into segments that walk in lock-step, each
    reading some tokens before its own from a zero context. The burn-in doubles until every segment starts
    where its predecessor ends.

    Args:
        tolerance: largest difference allowed of any component.
        fresh: bool `[n]`, True where a token begins a conversation that is read from the zero context.

    Returns:
        padded contexts and the largest difference of any component at a segment's start.

    Raises:
        UserError: the block does not forget its start within `LAST_BURN_IN` tokens.
    """
    burn_in = FIRST_BURN_IN
    while True:
        contexts, starts = _walk_segments(block, token_half, tokens, burn_in, fresh)
        ends = contexts[SEGMENT : len(tokens) : SEGMENT]  # padded row i is the context before token i
        error = (starts[1:] - ends).abs().max().item() if len(ends) else 0.0
        if error <= tolerance:
            return contexts, error
        if burn_in >= LAST_BURN_IN:
            raise UserError(
                f"The ContextBlock does not forget its start: segments still differ by {error:.1e} after a "
                f"burn-in of {burn_in} tokens (tolerance {tolerance:.0e}); train Phase 1 longer, raise "
                "phase1.tolerance, or use phase1.contexts=seed."
            )
        burn_in *= 2


def _walk_segments(
    block: ContextBlock, token_half: Tensor, tokens: Tensor, burn_in: int, fresh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Padded contexts, and each segment's context just before its first token, `[segments, context_dim]`."""
    count = len(tokens)
    segments = -(-count // SEGMENT)
    first = torch.arange(segments, device=tokens.device) * SEGMENT
    walked = token_half.new_zeros(segments, SEGMENT, token_half.shape[-1])
    state = token_half.new_zeros(segments, token_half.shape[-1])
    starts = state
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
            walked[:, step] = state
    return torch.cat([torch.zeros_like(state[:1]), walked.flatten(0, 1)[:count]]), starts
