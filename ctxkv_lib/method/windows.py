"""Which contexts a position sees: the index arithmetic of context windows.

Contexts of a stream are padded: stored with one zero row in front, `[num_tokens + 1, context_dim]`. Row
`i + 1` is the context of position i, row i the one before it, and a slot that does not exist is row 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import ModelConfig


class Window:
    """The slots of a window; slot 0 is the position itself.

    Attributes:
        offsets: how many tokens back each slot lies, ascending from 0; those of an attention plug-in, or
            `0, interval, 2 * interval, ...`.
    """

    def __init__(self, config: ModelConfig, offsets: Sequence[int] | None = None) -> None:
        uniform = [slot * config.interval for slot in range(config.max_contexts)]
        self.offsets = uniform if offsets is None else list(offsets)
        self._on_device: dict[torch.device, Tensor] = {}

    def slots(self, positions: Tensor) -> Tensor:
        """Return the positions that each of `positions`, int64 `[...]`, attends, nearest first.

        They are int64 `[..., slots]`, negative where the slot lies before the stream.
        """
        device = positions.device
        offsets = self._on_device.get(device)  # since every copy makes a GPU wait
        # In a model that was built on the meta device, what is stored under a device may lie elsewhere.
        if offsets is None or offsets.device != device:
            offsets = torch.tensor(self.offsets, device=device)
            if type(offsets) is Tensor:  # no stand-in for one, as `torch.export` has while it traces
                self._on_device[device] = offsets
        return positions[..., None] - offsets

    def rows(self, positions: Tensor) -> Tensor:
        """Return `slots` as rows of padded contexts; 0 where the slot lies before the stream."""
        return (self.slots(positions) + 1).clamp(min=0)
