"""Copying: a token becomes more likely if it followed a similar context before (Grave et al., 2017).

A layer turns copying on with its attribute `copying`. Copying has no trained weights and is off during
training; it is used in validation, tests, generation and evaluation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING = 1e-38  # lower limit of probabilities before the log, since the log of 0 has no gradient


class Copying(NamedTuple):
    """The strength of copying, and how strongly it prefers similar contexts."""

    weight: float  # total probability of copied tokens, less than 1
    sharpness: float  # multiplies the cosine of two contexts; at 0, all tokens in reach have equal weight

    def shares(self, contexts: Tensor, rows: Tensor, first: Tensor, reach: int) -> Tensor:
        """Compute the probability that each of the `reach` previous contexts adds to the token that followed.

        Args:
            contexts: the contexts in text order, `[batch, m, context_dim]`.
            rows: the rows at which the next token is predicted, int64 `[batch, n]`.
            first: the first row of each text, int64 `[batch]`.

        Returns:
            Shares, float32 `[batch, n, reach]`, nearest context first. They add up to `weight`, or to 0 if no
            context comes before the row.
        """
        before = rows[..., None] - torch.arange(1, reach + 1, device=rows.device)
        with torch.autocast(contexts.device.type, enabled=False):
            unit = F.normalize(contexts.float(), dim=-1)
            present = unit.gather(1, rows[..., None].expand(-1, -1, unit.shape[-1]))
            cosines = (present @ unit.mT).gather(2, before.clamp(min=0))  # (batch, n, reach)
        scores = (self.sharpness * cosines).masked_fill(before < first[:, None, None], -torch.inf)
        return self.weight * scores.softmax(dim=-1).nan_to_num()


def mix(logits: Tensor, tokens: Tensor, shares: Tensor) -> Tensor:
    """Return the log-probabilities of the mixture of predicted and copied tokens.

    Args:
        logits: `[..., vocab_size]`.
        tokens: integers `[..., reach]`, the tokens that followed the contexts of `shares`.
        shares: float32 `[..., reach]`; see `Copying.shares`.
    """
    tokens, left = tokens.long(), 1 - shares.sum(dim=-1, keepdim=True)
    predicted = logits.float().log_softmax(dim=-1) + left.clamp(min=NOTHING).log()
    copied = torch.zeros_like(predicted).scatter_add_(-1, tokens, shares).gather(-1, tokens)
    mixed = torch.logaddexp(predicted.gather(-1, tokens), copied.clamp(min=NOTHING).log())
    return predicted.scatter(-1, tokens, mixed).to(logits.dtype)
