"""Index arithmetic of context windows: which positions a position sees.

Slot 0 is the position itself. The others lie `interval` apart: counted back from the position
(anchor "current", as published), or on multiples of the interval (anchor "grid"), where one context in
`interval` is ever read again.

Contexts of a stream are stored with one zero row in front (`[num_tokens + 1, context_dim]`, row 0 is "before
the stream"), so row `i + 1` is the context of position i, row `i` is the one before it, and a slot that does
not exist is simply row 0.
"""

import torch
from torch import Tensor


def slot_positions(positions: Tensor, interval: int, max_contexts: int, anchor: str) -> Tensor:
    """Positions that each position attends, nearest first.

    Args:
        positions: int64 `[...]`, token positions in the stream.
        interval: tokens between two slots.
        max_contexts: slots of a window.
        anchor: "current" or "grid".

    Returns:
        int64 `[..., max_contexts]`; negative where the slot lies before the stream.
    """
    back = torch.arange(max_contexts, device=positions.device)
    if anchor == "current":
        return positions[..., None] - back * interval
    on_grid = ((positions[..., None] - 1).div(interval, rounding_mode="floor") + 1 - back) * interval
    return torch.where(back == 0, positions[..., None], on_grid)


def window_rows(positions: Tensor, interval: int, max_contexts: int, anchor: str) -> Tensor:
    """`slot_positions` as rows of padded contexts; 0 where the slot lies before the stream."""
    return (slot_positions(positions, interval, max_contexts, anchor) + 1).clamp(min=0)


def real_contexts(position: int, interval: int, max_contexts: int, anchor: str = "current") -> int:
    """How many slots of the window at `position` hold a context of the stream."""
    reached = position if anchor == "current" else position + interval - 1
    return min(reached // interval + 1, max_contexts)


def theoretical_max(num_tokens: int, interval: int) -> int:
    """Contexts that `num_tokens` tokens would give if the window had no limit."""
    return num_tokens // interval + 1
