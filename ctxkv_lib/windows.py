"""Index arithmetic of context windows: which positions a position sees.

Contexts are stored with one zero row in front (`[num_tokens + 1, context_dim]`, row 0 is "before the
stream"), so row `i + 1` is the context of position i, row `i` is the one before it, and a slot that does
not exist is simply row 0.
"""

import torch
from torch import Tensor


def window_rows(positions: Tensor, interval: int, max_contexts: int) -> Tensor:
    """Rows of the padded contexts that each position attends, nearest first.

    Position i sees positions i - interval * k for k = 0 .. max_contexts - 1 where they exist.

    Args:
        positions: int64 `[n]`, token positions in the stream.
        interval: tokens between two slots.
        max_contexts: slots of a window.

    Returns:
        int64 `[n, max_contexts]`; 0 where the slot lies before the stream.
    """
    back = torch.arange(max_contexts, device=positions.device) * interval
    return (positions[:, None] - back + 1).clamp(min=0)


def real_contexts(position: int, interval: int, max_contexts: int) -> int:
    """How many slots of the window at `position` hold a context of the stream."""
    return min(position // interval + 1, max_contexts)


def theoretical_max(num_tokens: int, interval: int) -> int:
    """Contexts that `num_tokens` tokens would give if the window had no limit."""
    return num_tokens // interval + 1
