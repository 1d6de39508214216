"""Copying favors tokens that followed similar contexts earlier in the text (Grave et al., 2017).

A layer turns copying on with its attribute `copying`. Copying has no trained weights and is off during
training; it is used in validation, tests, generation and evaluation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Probabilities are raised to at least this number before the log, because the log of 0 has no gradient.
NOTHING = 1e-38


class Copying(NamedTuple):
    """The settings of copying: the probability of copied tokens, and the preference for similar contexts."""

    weight: float  # total probability of copied tokens, less than 1
    sharpness: float  # factor for the cosine similarity of contexts; 0 gives all contexts equal shares

    def shares(self, contexts: Tensor, rows: Tensor, first: Tensor, reach: int) -> Tensor:
        """Compute how much probability each of the `reach` previous contexts gives to the token after it.

        Args:
            contexts: the contexts in text order, `[batch, m, context_dim]`.
            rows: the rows of `contexts` at which the next token is predicted, int64 `[batch, n]`.
            first: the row of each text's first context, int64 `[batch]`.

        Returns:
            Shares of probability, float32 `[batch, n, reach]`, nearest context first. The shares at a row add
            up to `weight`, or to 0 if no context comes before the row.
        """
        before = rows[..., None] - torch.arange(1, reach + 1, device=rows.device)
        with torch.autocast(contexts.device.type, enabled=False):
            unit = F.normalize(contexts.float(), dim=-1)
            present = unit.gather(1, rows[..., None].expand(-1, -1, unit.shape[-1]))
            cosines = (present @ unit.mT).gather(2, before.clamp(min=0))  # (batch, n, reach)
        scores = (self.sharpness * cosines).masked_fill(before < first[:, None, None], -torch.inf)
        return self.weight * scores.softmax(dim=-1).nan_to_num()


def mix(logits: Tensor, tokens: Tensor, shares: Tensor) -> Tensor:
    """Return log-probabilities `[..., vocab_size]` that mix the model's prediction with copied tokens.

    Args:
        logits: `[..., vocab_size]`.
        tokens: integers `[..., reach]`, the tokens after the previous contexts, in the order of `shares`.
        shares: float32 `[..., reach]`; see `Copying.shares`.
    """
    tokens, left = tokens.long(), 1 - shares.sum(dim=-1, keepdim=True)
    predicted = logits.float().log_softmax(dim=-1) + left.clamp(min=NOTHING).log()
    copied = torch.zeros_like(predicted).scatter_add_(-1, tokens, shares).gather(-1, tokens)
    mixed = torch.logaddexp(predicted.gather(-1, tokens), copied.clamp(min=NOTHING).log())
    return predicted.scatter(-1, tokens, mixed).to(logits.dtype)
