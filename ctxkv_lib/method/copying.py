"""Copying: a token that followed a similar context before becomes more likely (Grave et al., 2017).

A layer turns it on by its attribute `copying`. Nothing is trained for it, and training does not copy: copying
takes part in validation, tests, generation and evaluation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING = 1e-38  # the least probability of what is copied, or left: the log of 0 has no gradient


class Copying(NamedTuple):
    """How much is copied, and how similar contexts have to be."""

    weight: float  # the share of the probability that is copied, less than 1
    sharpness: float  # the factor of the cosine of two contexts; with 0 all tokens in reach count the same

    def shares(self, contexts: Tensor, rows: Tensor, first: Tensor, reach: int) -> Tensor:
        """Compute the probability that each of the `reach` contexts before a row adds to the token after it.

        Args:
            contexts: in the order of the text, `[batch, m, context_dim]`.
            rows: those at which something is predicted, int64 `[batch, n]`.
            first: the first row of each text, int64 `[batch]`.

        Returns:
            float32 `[batch, n, reach]`, nearest first, with the sum `weight`, or 0 where nothing is before.
        """
        before = rows[..., None] - torch.arange(1, reach + 1, device=rows.device)
        with torch.autocast(contexts.device.type, enabled=False):
            unit = F.normalize(contexts.float(), dim=-1)
            present = unit.gather(1, rows[..., None].expand(-1, -1, unit.shape[-1]))
            cosines = (present @ unit.mT).gather(2, before.clamp(min=0))  # (batch, n, reach)
        scores = (self.sharpness * cosines).masked_fill(before < first[:, None, None], -torch.inf)
        return self.weight * scores.softmax(dim=-1).nan_to_num()


def mix(logits: Tensor, tokens: Tensor, shares: Tensor) -> Tensor:
    """Return log-probabilities of the model and of the copied tokens.

    Args:
        logits: `[..., vocab_size]`.
        tokens: integers `[..., reach]`, those that followed the contexts of `shares`.
        shares: float32 `[..., reach]`, see `Copying.shares`.
    """
    tokens, left = tokens.long(), 1 - shares.sum(dim=-1, keepdim=True)
    predicted = logits.float().log_softmax(dim=-1) + left.clamp(min=NOTHING).log()
    copied = torch.zeros_like(predicted).scatter_add_(-1, tokens, shares).gather(-1, tokens)
    mixed = torch.logaddexp(predicted.gather(-1, tokens), copied.clamp(min=NOTHING).log())
    return predicted.scatter(-1, tokens, mixed).to(logits.dtype)
