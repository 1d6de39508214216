"""Copying: a token that followed a similar context before becomes more likely (Grave et al., 2017).

An attention turns it on by an attribute `copying`. Nothing is trained, and training does without it:
it takes part in validation, tests, generation and evaluation.
"""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import ContextKV

COMPARED_AT_ONCE = 64  # positions
NOTHING = 1e-38  # the least probability of what is copied, or left: the log of 0 has no gradient


class Recent(NamedTuple):
    """Positions that copy, and n contexts in the order of the text: theirs, and those before.

    Attributes:
        contexts: `[n, context_dim]`.
        tokens: that of each context, int32 or int64 `[n]`.
        rows: of each position that copies, int64 `[...]`.
        before: how many tokens it can copy from, int64 `[...]`.
    """

    contexts: Tensor
    tokens: Tensor
    rows: Tensor
    before: Tensor


class Copies(NamedTuple):
    """What may be copied at each position.

    Attributes:
        tokens: those that followed the m tokens before, int32 or int64 `[..., m]`.
        shares: the probability that each adds to its token, float32 `[..., m]`; they sum to the weight, or
            to 0 where there is nothing before.
    """

    tokens: Tensor
    shares: Tensor

    def at(self, index: Any) -> Self:
        """Return the copies at some of the positions."""
        return type(self)(*(each[index] for each in self))

    def log_left(self) -> Tensor:
        """Compute the log of the probability that is left for the model, `[...]`."""
        return (1 - self.shares.sum(dim=-1)).clamp(min=NOTHING).log()


class Copying(NamedTuple):
    """How much is copied, and how similar contexts have to be.

    Attributes:
        weight: the share of the probability that is copied.
        sharpness: the factor of the cosine of two contexts; with 0 all tokens in reach count the same.
    """

    weight: float
    sharpness: float

    def copies(self, recent: Recent, reach: int) -> Copies:
        """Compare each position with those up to `reach` tokens before: `Copies` of `[..., reach]`."""
        back = torch.arange(1, reach + 1, device=recent.rows.device)
        places = [torch.atleast_2d(each).flatten(0, -2) for each in (recent.rows, recent.before)]
        if is_alone := places[0].shape[1] == 1:  # one position of each text, as in generation
            places = [each.T for each in places]
        shares = []
        with torch.autocast(back.device.type, enabled=False):
            for text in zip(*places, strict=True):
                for rows, before in zip(*(each.split(COMPARED_AT_ONCE) for each in text), strict=True):
                    shares.append(self._shares(recent.contexts, back, rows, before, is_alone))
        tokens = recent.tokens[(recent.rows[..., None] - back + 1).clamp(min=0)]
        return Copies(tokens, torch.cat(shares).view_as(tokens))

    def _shares(self, contexts: Tensor, back: Tensor, rows: Tensor, before: Tensor, is_alone: bool) -> Tensor:
        """Compute the shares of the tokens `back` from each row, `[n, len(back)]`; see `Recent`.

        Rows of one text share what they are compared with, of which each is read once; a GPU waits for that.
        """
        places = (rows[:, None] - back).clamp(min=0)
        own = F.normalize(contexts[rows].float())
        if is_alone:
            cosines = (F.normalize(contexts[places].float(), dim=-1) @ own[..., None])[..., 0]
        else:
            others, places = places.unique(return_inverse=True)
            cosines = (own @ F.normalize(contexts[others].float()).T).gather(1, places)
        scores = (self.sharpness * cosines).masked_fill(back > before[:, None], -torch.inf)
        return self.weight * scores.softmax(dim=-1).nan_to_num()


def copying_of(model: ContextKV) -> Copying | None:
    """Return how a model copies outside of training, if it does."""
    return getattr(model.attention, "copying", None)


def mix(logits: Tensor, copies: Copies) -> Tensor:
    """Return the log of the distribution of logits `[..., vocab_size]` that gives a share to the copies."""
    tokens = copies.tokens.long()
    own = logits.float().log_softmax(dim=-1) + copies.log_left()[..., None]
    copied = torch.zeros_like(own).scatter_add_(-1, tokens, copies.shares).gather(-1, tokens)
    both = torch.logaddexp(own.gather(-1, tokens), copied.clamp(min=NOTHING).log())
    return own.scatter(-1, tokens, both).to(logits.dtype)


def mix_losses(losses: Tensor, targets: Tensor, copies: Copies) -> Tensor:
    """Compute the losses of `mix` from the model's own, of targets int64 `[...]`, in nats."""
    copied = (copies.shares * (copies.tokens == targets[..., None])).sum(dim=-1)
    return -torch.logaddexp(copies.log_left() - losses, copied.clamp(min=NOTHING).log())
