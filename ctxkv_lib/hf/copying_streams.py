"""Cached streams as a model reads them that copies (see `copying`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method.caches import Batch, StreamCache
from ..method.copying import Copies, Copying, Recent, copying_of, mix
from ..method.model import ContextKV
from ..method.windows import Window

SCORED_AT_ONCE = 256  # positions with all their logits


@dataclass(frozen=True)
class CopyingBatch(Batch):
    """A batch with its `Copies`."""

    copied: Tensor
    shares: Tensor

    def logits(self, model: ContextKV) -> Tensor:
        return mix(super().logits(model), Copies(self.copied, self.shares))

    def scores(self, model: ContextKV) -> tuple[Tensor, Tensor]:
        found = []
        for part, _ in self.split(max(1, -(-len(self) // SCORED_AT_ONCE))):
            logits = part.logits(model)
            own = logits.gather(1, part.targets[:, None])[:, 0]
            found.append((-own, own == logits.amax(dim=1)))
        losses, correct = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(correct)


@dataclass(frozen=True, kw_only=True)
class CopyingStream(StreamCache):
    """A cached stream of which all contexts in reach of a window are compared."""

    copying: Copying

    def gather(self, positions: Tensor, window: Window) -> Batch:
        positions = positions.to(self.contexts.device)
        local = positions if self.begins is None else positions - self.begins[positions]
        tokens = self.ids.to(positions.device)
        recent = Recent(self.contexts[1:], tokens, positions, local)
        copies = self.copying.copies(recent, window.offsets[-1])
        return CopyingBatch(
            **vars(super().gather(positions, window)), copied=copies.tokens, shares=copies.shares
        )

    def attend(self, model: ContextKV, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        return StreamCache(**self.tensors()).attend(model, positions)  # for which nothing is compared


def as_served(model: ContextKV, cache: StreamCache) -> StreamCache:
    """Return a cached stream as `model` reads it outside of training."""
    copying = copying_of(model)
    return cache if copying is None else CopyingStream(**cache.tensors(), copying=copying)
