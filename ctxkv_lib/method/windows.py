"""Index arithmetic of context windows: which positions a position sees.

Slot 0 is the position itself. The others lie `interval` apart (slots "uniform"), counted back from the
position (anchor "current", as published) or on multiples of the interval (anchor "grid"), where one context
in `interval` is ever read again; or they lie close together near the position and ever further apart, as far
back as the uniform ones (slots "geometric").

Contexts of a stream are stored with one zero row in front (`[num_tokens + 1, context_dim]`, row 0 is "before
the stream"), so row `i + 1` is the context of position i, row `i` is the one before it, and a slot that does
not exist is simply row 0.
"""

from typing import Protocol

import torch
from torch import Tensor


class Shape(Protocol):
    """What a window depends on: `ModelConfig`, or a saved model's configuration."""

    @property
    def interval(self) -> int: ...
    @property
    def max_contexts(self) -> int: ...
    @property
    def anchor(self) -> str: ...
    @property
    def slots(self) -> str: ...


def slot_offsets(shape: Shape) -> list[int]:
    """How far back the slots lie with anchor "current", nearest first: `max_contexts` different distances.

    Geometric: 0, then 1, and from there on each by the same factor further, but at least by one.
    """
    count = shape.max_contexts
    if shape.slots == "uniform" or count < 3:
        return [slot * shape.interval for slot in range(count)]
    reach = shape.interval * (count - 1)
    return [0, *(max(slot, round(reach ** ((slot - 1) / (count - 2)))) for slot in range(1, count))]


def slot_positions(positions: Tensor, shape: Shape) -> Tensor:
    """Positions that each position attends, nearest first.

    Args:
        positions: int64 `[...]`, token positions in the stream.

    Returns:
        int64 `[..., max_contexts]`; negative where the slot lies before the stream.
    """
    if shape.anchor == "current":
        return positions[..., None] - _offsets(positions, shape)
    back = torch.arange(shape.max_contexts, device=positions.device)
    on_grid = (
        (positions[..., None] - 1).div(shape.interval, rounding_mode="floor") + 1 - back
    ) * shape.interval
    return torch.where(back == 0, positions[..., None], on_grid)


def window_rows(positions: Tensor, shape: Shape) -> Tensor:
    """`slot_positions` as rows of padded contexts; 0 where the slot lies before the stream."""
    return (slot_positions(positions, shape) + 1).clamp(min=0)


def real_contexts(positions: Tensor, shape: Shape) -> Tensor:
    """How many slots of the window at each position hold a context of the stream: int64, as `positions`."""
    if shape.anchor == "current":
        return torch.searchsorted(_offsets(positions, shape), positions, right=True)
    return (
        (positions + 2 * shape.interval - 1)
        .div(shape.interval, rounding_mode="floor")
        .clamp(max=shape.max_contexts)
    )


def _offsets(positions: Tensor, shape: Shape) -> Tensor:
    return torch.tensor(slot_offsets(shape), device=positions.device)


def theoretical_max(num_tokens: int, interval: int) -> int:
    """Contexts that `num_tokens` tokens would give if the window had no limit."""
    return num_tokens // interval + 1
