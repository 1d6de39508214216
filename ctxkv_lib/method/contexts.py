"""Contexts of a stream: by the original's parallel passes, or by the exact recurrence.

Tokens are indices `tokens` `[n]` into the distinct ones (`distinct_rows`), whose input projections are
`projected_inputs` `[num_distinct, context_dim]`. Contexts are padded, `[n + 1, context_dim]`: row 0 is the
context before the first token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import Phase1Config
from .scan import Block, Stream, segmented_scan

BLOCK = 2**18  # tokens of one segmented scan, which bounds the memory of its contexts: 256 MiB
PASS_ROWS = 2**14  # contexts of a parallel pass at a time


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
    for start in range(0, len(tokens), BLOCK):
        chunk = slice(start, start + BLOCK)
        rows = tokens[chunk].to(projected_inputs.device, torch.int64)
        begins = None if is_first is None else is_first[chunk].to(rows) - 1
        place = contexts[start : start + BLOCK + 1]
        made = place.to(projected_inputs)  # the same tensor, where nothing has to be changed
        made[0] = state
        stream = Stream(block, projected_inputs, rows, begins, projected_inputs.new_zeros(1, width))
        error = max(error, segmented_scan(stream, made, tolerance))
        place.copy_(made)  # nothing, if it is the same tensor
        state = made[-1].clone()
    return contexts, error
