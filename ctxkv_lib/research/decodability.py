"""Decodability: how well the tokens before a position can be decoded from its context.

Ridge regressions from the context at t to the embedding of the token at t - d, fitted on one stream and
evaluated on another. Generalised cross-validation chooses the strength of the ridge for each distance (Golub,
Heath and Wahba, 1979): where nothing is remembered, the weights shrink to zero.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from ..method.config import ModelConfig
from ..method.windows import Window

SPAN_R2 = 0.01  # a token counts as forgotten if R² is not above this
NAMED_ROWS = 1024  # positions at which the token is named; enough for a share within 0.015
STRENGTHS = torch.logspace(-6, 4, 41, dtype=torch.float64)  # of the ridge, in mean eigenvalues


class Stream(NamedTuple):
    """Contexts and the tokens they were computed from."""

    contexts: Tensor  # float32 `[n, context_dim]`, after each token
    tokens: Tensor  # int64 `[n]`, rows of a table of embeddings


class Ridge:
    """Ridge regressions on one set of contexts, float32 `[n, context_dim]`, for any targets."""

    def __init__(self, contexts: Tensor) -> None:
        self.mean = contexts.mean(dim=0)
        self.centred = contexts - self.mean
        values, self.vectors = torch.linalg.eigh((self.centred.T @ self.centred).double())
        self.values = values.clamp(min=1e-9 * values.max().item())

    def fit(self, table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Fit the targets `table[rows]`, float32 `[m, outputs]` and int64 `[n]`.

        Returns:
            weights `[context_dim, outputs]` for centred contexts, and the targets' mean, float32.
        """
        counts = torch.bincount(rows, minlength=len(table)).to(table)
        mean = counts @ table / len(rows)
        energy = (counts @ (table - mean).square().sum(dim=1)).item()
        sums = table.new_zeros(len(table), len(self.mean)).index_add_(0, rows, self.centred)
        turned = self.vectors.T @ (sums.T @ table).double()  # (context_dim, outputs)
        strengths = STRENGTHS.to(turned.device) * self.values.mean()
        shrunk = self.values / (self.values + strengths[:, None])  # (strengths, context_dim)
        gain = turned.square().sum(dim=1) / self.values
        residual = energy - (gain * (2 * shrunk - shrunk.square())).sum(dim=1)
        free = len(rows) - 1 - shrunk.sum(dim=1)
        best = strengths[(residual / free.square()).argmin()]
        return (self.vectors @ (turned / (self.values + best)[:, None])).float(), mean


def decodability(
    train: Stream, held_out: Stream, embeddings: Tensor, distances: Sequence[int]
) -> list[dict[str, float]]:
    """Measure how well a context encodes the token at each distance back.

    Args:
        train, held_out: what is fitted, and what is evaluated.
        embeddings: float32 `[distinct, hidden_size]`, all of one norm.
        distances: 0 is the token just read.

    Returns:
        for each distance: `distance`; `r2`, the explained share of the embedding's variance; `top1`, the
        share of positions whose token is the nearest of all to the decoded embedding.
    """
    skipped, found = max(distances), []
    ridge = Ridge(train.contexts[skipped:])
    rows = held_out.contexts[skipped:] - ridge.mean
    for distance in distances:
        targets, wanted = (
            tokens[skipped - distance : len(tokens) - distance] for _, tokens in (train, held_out)
        )
        weights, mean = ridge.fit(embeddings, targets)
        scores = rows[:NAMED_ROWS] @ (weights @ embeddings.T) + embeddings @ mean
        top1 = (scores.argmax(dim=1) == wanted[:NAMED_ROWS]).float().mean().item()
        r2 = _explained(rows @ weights, embeddings[wanted] - mean)
        found.append({"distance": distance, "r2": r2, "top1": top1})
    return found


def mean_decodability(train: Stream, held_out: Stream, embeddings: Tensor, count: int) -> float:
    """Compute R² of the mean embedding of the last `count` tokens."""
    sums = (embeddings[side.tokens].double().cumsum(dim=0) for side in (train, held_out))
    targets, wanted = (((each[count:] - each[:-count]) / count).float() for each in sums)
    ridge = Ridge(train.contexts[count:])
    weights, mean = ridge.fit(targets, torch.arange(len(targets)))
    return _explained((held_out.contexts[count:] - ridge.mean) @ weights, wanted - mean)


def memory_span(found: Sequence[dict[str, float]]) -> int | None:
    """Return the distance in tokens up to which R² stays above `SPAN_R2`; None if it never is."""
    held = list(takewhile(lambda row: row["r2"] > SPAN_R2, found))
    return int(held[-1]["distance"]) if held else None


def coverage(shape: ModelConfig, window: Window, span: int | None) -> float:
    """Compute the share of the window within some slot's memory span, of `span` tokens."""
    positions = shape.context_window + torch.arange(window.step)  # from then on, offsets of slots repeat
    tokens = positions[:, None, None] - torch.arange(shape.context_window)[:, None]
    behind = window.slots(positions)[:, None] - tokens  # (step, context_window, slots)
    reach = -1 if span is None else span
    return ((behind >= 0) & (behind <= reach)).any(dim=2).double().mean().item()


def centroid(contexts: Tensor) -> float:
    """Compute the mean context's norm, as a share of the contexts' root mean square norm."""
    return (contexts.mean(dim=0).norm() / contexts.square().sum(dim=1).mean().sqrt()).item()


def _explained(decoded: Tensor, truth: Tensor) -> float:
    """Compute R² of decoded embeddings, after subtracting the training targets' mean from both."""
    return 1 - ((truth - decoded).square().sum() / truth.square().sum()).item()
