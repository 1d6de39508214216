"""What contexts remember: how well the tokens before a position can be decoded from its context.

Ridge regressions from the context at t to the embedding of the token at t - d, fitted on one stream and
evaluated on another. Generalised cross-validation chooses the strength of the ridge for each distance (Golub,
Heath and Wahba, 1979): where nothing is remembered, nothing is fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method.config import ModelConfig
from ..method.windows import Window

SPAN_R2 = 0.01  # a token counts as forgotten if R² is not above this
NAMED_ROWS = 1024  # positions at which the token is named; enough for a share within 0.015
STRENGTHS = torch.logspace(-6, 4, 41, dtype=torch.float64)  # of the ridge, in mean eigenvalues


@dataclass(frozen=True)
class Stream:
    """Contexts beside the tokens they were made from.

    Attributes:
        contexts: float32 `[n, context_dim]`, after each token.
        tokens: int64 `[n]`, rows of a table of embeddings.
    """

    contexts: Tensor
    tokens: Tensor

    def back(self, distance: int, skipped: int) -> Tensor:
        """The token `distance` before each position from `skipped` on: int64 `[n - skipped]`."""
        return self.tokens[skipped - distance : len(self.tokens) - distance]


class Ridge:
    """Ridge regressions on one set of contexts, for any targets."""

    def __init__(self, contexts: Tensor) -> None:
        """Prepare float32 `[n, context_dim]`."""
        self.mean = contexts.mean(dim=0)
        self.centred = contexts - self.mean
        values, self.vectors = torch.linalg.eigh((self.centred.T @ self.centred).double())
        self.values = values.clamp(min=1e-9 * values.max().item())

    def weights(self, cross: Tensor, energy: float) -> Tensor:
        """Fit targets Y `[n, outputs]`: float32 `[context_dim, outputs]`.

        Args:
            cross: `centred.T @ Y`.
            energy: squared norm of Y without its mean.
        """
        turned = self.vectors.T @ cross.double()  # (context_dim, outputs)
        strengths = STRENGTHS.to(turned.device) * self.values.mean()
        shrunk = self.values / (self.values + strengths[:, None])  # (strengths, context_dim)
        gain = turned.square().sum(dim=1) / self.values
        residual = energy - (gain * (2 * shrunk - shrunk.square())).sum(dim=1)
        free = len(self.centred) - 1 - shrunk.sum(dim=1)
        best = strengths[(residual / free.square()).argmin()]
        return (self.vectors @ (turned / (self.values + best)[:, None])).float()


def decodability(
    train: Stream, held_out: Stream, embeddings: Tensor, distances: Sequence[int]
) -> list[dict[str, float]]:
    """Measure how much of the token so many positions back a context still has.

    Args:
        train: what is fitted.
        held_out: what is evaluated.
        embeddings: float32 `[distinct, hidden_size]`, all of one norm.
        distances: 0 is the token just read.

    Returns:
        for each distance: `distance`; `r2`, the explained share of the embedding's variance; `top1`, the
        share of positions whose token is the nearest of all to the decoded embedding.
    """
    skipped = max(distances)
    ridge = Ridge(train.contexts[skipped:])
    rows = held_out.contexts[skipped:] - ridge.mean
    found = []
    for distance in distances:
        targets, wanted = train.back(distance, skipped), held_out.back(distance, skipped)
        counts = torch.bincount(targets, minlength=len(embeddings)).to(embeddings)
        mean = counts @ embeddings / len(targets)
        energy = (counts @ (embeddings - mean).square().sum(dim=1)).item()
        by_token = ridge.centred.new_zeros(len(embeddings), rows.shape[1])
        by_token.index_add_(0, targets, ridge.centred)  # the contexts of each token, summed
        weights = ridge.weights(by_token.T @ embeddings, energy)
        scores = rows[:NAMED_ROWS] @ (weights @ embeddings.T) + embeddings @ mean
        top1 = (scores.argmax(dim=1) == wanted[:NAMED_ROWS]).float().mean().item()
        r2 = _explained(rows @ weights, embeddings[wanted] - mean)
        found.append({"distance": distance, "r2": r2, "top1": top1})
    return found


def mean_decodability(train: Stream, held_out: Stream, embeddings: Tensor, count: int) -> float:
    """R² of the mean embedding of the last `count` tokens."""
    ridge = Ridge(train.contexts[count:])
    targets, wanted = (_last_means(embeddings[side.tokens], count) for side in (train, held_out))
    mean = targets.mean(dim=0)
    energy = (targets - mean).square().sum().item()
    weights = ridge.weights(ridge.centred.T @ targets, energy)
    return _explained((held_out.contexts[count:] - ridge.mean) @ weights, wanted - mean)


def memory_span(found: Sequence[dict[str, float]]) -> int | None:
    """The furthest distance up to which R² stays above `SPAN_R2`, in tokens; None if the first does not."""
    last = None
    for row in found:
        if row["r2"] <= SPAN_R2:
            break
        last = int(row["distance"])
    return last


def coverage(shape: ModelConfig, window: Window, span: int | None) -> float:
    """Share of the window within some slot's memory span, if a context reaches `span` tokens back."""
    if span is None:
        return 0.0
    shares = []
    for position in range(shape.context_window, shape.context_window + shape.interval):
        token = position - torch.arange(shape.context_window)
        slots = window.slots(torch.tensor(position))
        behind = slots - token[:, None]  # (tokens, slots)
        shares.append(((behind >= 0) & (behind <= span)).any(dim=1).float().mean())
    return torch.stack(shares).mean().item()


def centroid(contexts: Tensor) -> float:
    """Norm of the mean context, as a share of the contexts' root mean square norm."""
    return (contexts.mean(dim=0).norm() / contexts.square().sum(dim=1).mean().sqrt()).item()


def _last_means(rows: Tensor, count: int) -> Tensor:
    """Mean of the last `count` rows at each position from `count` on: `[n - count, ...]`."""
    sums = rows.double().cumsum(dim=0)
    return ((sums[count:] - sums[:-count]) / count).float()


def _explained(decoded: Tensor, truth: Tensor) -> float:
    """R² of what was decoded, both without the training targets' mean."""
    return 1 - ((truth - decoded).square().sum() / truth.square().sum()).item()
