"""Which contexts a position sees: the index arithmetic of context windows.

Slot 0 of a window is the position itself; the others lie `interval` tokens apart, counted back from the
position (anchor "current", as published) or on multiples of the interval (anchor "grid"), where only one
context in `interval` is ever read again.

Contexts of a stream are stored with one zero row in front (`[num_tokens + 1, context_dim]`, row 0 is "before
the stream"). Row `i + 1` is the context of position i, row i is the one before it, and a slot that does not
exist is row 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import ModelConfig


class Window:
    """The slots of a window.

    Attributes:
        offsets: how many tokens back each slot lies, ascending from 0.
        step: a slot other than the first lies on a multiple of so many tokens; 1 with anchor "current".
    """

    def __init__(self, config: ModelConfig, offsets: Sequence[int] | None = None) -> None:
        """Build the window of a model.

        Args:
            offsets: distances in tokens, of which an attention plug-in may have its own; by default
                `0, interval, 2 * interval, ...`. Multiples of the interval with anchor "grid".
        """
        uniform = [slot * config.interval for slot in range(config.max_contexts)]
        self.offsets = uniform if offsets is None else list(offsets)
        self.step = 1 if config.anchor == "current" else config.interval
        self._on_device: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def kept_contexts(self) -> int:
        """Contexts that reading on from a text needs, one more than `ContextCache` stores."""
        return self.offsets[-1] // self.step + 1

    def slots(self, positions: Tensor) -> Tensor:
        """Return the positions that each position attends, nearest first.

        Args:
            positions: int64 `[...]`, token positions in the stream.

        Returns:
            int64 `[..., slots]`; negative where the slot lies before the stream.
        """
        back = self._offsets(positions.device)
        if self.step == 1:
            return positions[..., None] - back
        last = (positions[..., None] - 1).div(self.step, rounding_mode="floor") * self.step
        on_grid = last + self.step - back
        return torch.where(back == 0, positions[..., None], on_grid)

    def rows(self, positions: Tensor) -> Tensor:
        """Return `slots` as rows of padded contexts; 0 where the slot lies before the stream."""
        return (self.slots(positions) + 1).clamp(min=0)

    def _offsets(self, device: torch.device) -> Tensor:
        """Return the offsets on a device; made once, since every copy makes a GPU wait."""
        held = self._on_device.get(device)
        if held is None or held.device != device:  # which a model may be that was loaded on another device
            held = torch.tensor(self.offsets, device=device)
            if type(held) is Tensor:  # no stand-in for one, as `torch.export` has while it traces
                self._on_device[device] = held
        return held
