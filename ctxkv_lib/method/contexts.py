"""Contexts of a stream from a trained ContextBlock: the original's parallel passes, and the exact recurrence.

All functions take the tokens as distinct rows (`distinct_rows`): `token_half` `[num_distinct, context_dim]`
(`ContextBlock.project_tokens` of each distinct token) and `tokens` `[n]`, indices into it; and all make or
overwrite padded contexts `[n + 1, context_dim]`, row 0 zero (see `windows`).
"""

import torch
from torch import Tensor, nn

from ..progress import notice
from .config import Phase1Config
from ..runs.placement import PART_ROWS, parts
from .model import ContextKV
from .scan import Stream, walk

BLOCK = 2**18  # tokens of the exact recurrence at a time, so that what is written lies together: 256 MiB


@torch.no_grad()
def distinct_rows(model: ContextKV, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Normed embeddings of the distinct ones of `ids` `[n]`, and `ids` as rows of them, int64 `[n]`.

    Both are where the model is, wherever `ids` are; these are whole numbers of any dtype.
    """
    distinct, tokens = ids.to(model.device, torch.int32).unique(return_inverse=True)
    return model.embed(distinct), tokens


def stream_contexts(
    block: nn.Module,
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
    if config.context_method == "exact":
        _, error = exact_contexts(block, token_half, tokens, config.tolerance, out=contexts)
        say_rounding(error, config.tolerance)
        return error
    if not trained:
        draw_contexts(contexts, config.initial_std, generator)
    for _ in range(1 if trained else config.validation_passes):
        parallel_pass(block, token_half, tokens, contexts)
    return None


def say_rounding(error: float, tolerance: float) -> None:
    """A line if exact contexts are not as exact as was asked for."""
    if error > tolerance:
        notice(
            f"Contexts are exact to {error:.1e}, not to {tolerance:.0e} as asked for: "
            "rounding alone moves those of this ContextBlock as far."
        )


def draw_contexts(contexts: Tensor, std: float, generator: torch.Generator) -> None:
    """Overwrite padded contexts with draws from N(0, std)."""
    contexts[0] = 0
    for part in parts(contexts[1:]):
        drawn = torch.empty(part.shape, device=generator.device)
        part.copy_(drawn.normal_(std=std, generator=generator))


@torch.no_grad()
def parallel_pass(block: nn.Module, token_half: Tensor, tokens: Tensor, contexts: Tensor) -> None:
    """Overwrite `contexts`: every position at once, each from what they held for the position before it."""
    before = contexts[:1].to(token_half.device)
    for start in range(0, len(tokens), PART_ROWS):
        rows = tokens[start : start + PART_ROWS]
        stop = start + len(rows)
        held = contexts[start + 1 : stop + 1].to(token_half.device)
        previous = torch.cat([before, held[:-1]])
        before = held[-1:].clone()
        contexts[start + 1 : stop + 1] = block(previous, token_half[rows])


@torch.no_grad()
def exact_contexts(
    block: nn.Module,
    token_half: Tensor,
    tokens: Tensor,
    tolerance: float,
    fresh: Tensor | None = None,
    out: Tensor | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, float]:
    """The contexts that reading the stream token by token gives, `BLOCK` tokens after another.

    Args:
        tokens: any integers `[n]`, on any device.
        tolerance: largest difference allowed of any component, unless rounding makes a larger one.
        fresh: bool `[n]`, True where a token begins a conversation that is read from the zero context.
        out: padded contexts to overwrite, on any device; None makes new ones.
        before: context before the first token, `[context_dim]`, if `tokens` are the continuation of a stream;
            None: the zero context.

    Returns:
        padded contexts (`out`, if given) and the largest difference of any component that is left at a place
        where two segments meet (see `walk`).
    """
    device, dtype, width = token_half.device, token_half.dtype, token_half.shape[-1]
    contexts = token_half.new_empty(len(tokens) + 1, width) if out is None else out
    contexts[0] = 0 if before is None else before
    zero = token_half.new_zeros(1, width)
    state = zero[0] if before is None else before
    in_place = (contexts.device, contexts.dtype) == (device, dtype)
    room = token_half.new_empty(0 if in_place else min(BLOCK, len(tokens)) + 1, width)
    error = 0.0
    for start in range(0, len(tokens), BLOCK):
        part = tokens[start : start + BLOCK].to(device, torch.int64)
        begins = None if fresh is None else fresh[start : start + BLOCK].to(device, torch.int64) - 1
        made = (contexts[start:] if in_place else room)[: len(part) + 1]
        made[0] = state
        error = max(error, walk(Stream(block, token_half, part, begins, zero), made, tolerance))
        if not in_place:
            contexts[start + 1 : start + 1 + len(part)] = made[1:]
        state = made[-1].clone()
    return contexts, error
