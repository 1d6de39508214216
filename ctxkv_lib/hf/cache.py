"""The key-value cache of generation: a constant number of contexts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..method.copying import Recent
from ..method.windows import Window


class ContextCache(Cache):
    """The key-value cache of a batch of streams: recent contexts, of constant size.

    Windows slide with every token, so all contexts within reach are kept.

    Attributes:
        state: context after the last token read, `[batch, context_dim]`.
        stored: the last contexts a window can reach, oldest first, zero where there was none yet,
            `[batch, kept, context_dim]`.
        tokens: those of `stored`, int64 `[batch, kept]`, for a model that copies; else None.
        lengths: tokens read by each stream, int64 `[batch]`; padding is not read.
    """

    is_croppable = False  # else generation, where it checks whether to stop a step late, would crop it

    def __init__(
        self, window: Window, context_dim: int, batch_size: int, like: Tensor, keep_tokens: bool = False
    ) -> None:
        super().__init__(layers=[])
        self.window = window
        self.state = like.new_zeros(batch_size, context_dim)
        self.stored = like.new_zeros(batch_size, window.kept_contexts - 1, context_dim)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        self.tokens = torch.zeros_like(self.stored[..., 0], dtype=torch.int64) if keep_tokens else None
        self.columns = 0

    def extend(
        self, contexts: Tensor, read: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Recent | None]:
        """Add the contexts of new tokens, and find the windows of these tokens.

        Args:
            contexts: `[batch, length, context_dim]`, the state after each new column.
            read: bool `[batch, length]`, False where a column is padding.
            ids: the new tokens, int64 `[batch, length]`.

        Returns:
            memory `[batch, n, context_dim]`; for each new column the rows of `memory` that it attends,
            int64, and whether they hold a context, bool, both `[batch, length, max_contexts]`; and `Recent`,
            if the model copies.
        """
        positions = self.lengths[:, None] + read.cumsum(dim=1) - 1
        slots = self.window.slots(positions)
        kept = self.stored.shape[1]
        order = (~read).to(torch.int8).argsort(dim=1, stable=True)  # those that are read first
        packed = contexts.gather(1, order[..., None].expand_as(contexts))
        memory = torch.cat([self.stored, packed, contexts], dim=1)
        rows = slots - self.lengths[:, None, None] + kept
        own = kept + contexts.shape[1] + torch.arange(contexts.shape[1], device=contexts.device)
        rows = torch.cat([own.expand_as(positions)[..., None], rows[..., 1:]], dim=-1).clamp(min=0)

        last = read.sum(dim=1)[:, None] + torch.arange(kept, device=contexts.device)
        self.stored = memory.gather(1, last[..., None].expand(-1, -1, contexts.shape[-1]))
        recent = None
        if self.tokens is not None:
            tokens = torch.cat([self.tokens, ids.gather(1, order)], dim=1)
            self.tokens = tokens.gather(1, last)
            own = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)
            own = own.gather(1, (positions - self.lengths[:, None] + kept).clamp(min=0))
            recent = Recent(memory[:, : tokens.shape[1]].flatten(0, 1), tokens.flatten(), own, positions)
        self.state, self.lengths = contexts[:, -1], self.lengths + read.sum(dim=1)
        self.columns += contexts.shape[1]
        present = slots >= 0
        present[..., 0] = True  # also of padding before the text: without any slot, attention would be NaN
        return memory, rows, present, recent

    @property
    def nbytes(self) -> int:
        """Return the bytes held for the whole batch, which do not grow with the text."""
        held = (self.state, self.stored, self.lengths, self.tokens)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns of `input_ids` read so far, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1, which means no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self._replace(lambda held: held[indices.to(held.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch in place."""
        self._replace(lambda held: held.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Reset every row to the beginning of a new stream."""
        self._replace(torch.zeros_like)
        self.columns = 0

    def crop(self, *_: Any) -> None:
        raise NotImplementedError("Contexts cannot be unread; start again from an empty cache.")

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("state", "stored", "lengths", "tokens"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))
