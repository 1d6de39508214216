"""Measure what contexts remember: ridge regressions read the token some steps back from a context.

The regressions predict the embedding of the token at t - d from the context at t. They are fitted on one
stream and evaluated on another. Generalized cross-validation chooses the strength of the ridge for each
distance d (Golub, Heath and Wahba, 1979). Where contexts remember nothing, the weights shrink to zero.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A token counts as forgotten if its R² is not above this value.
SPAN_R2 = 0.01
# `top1` is computed at this many positions, which is enough for a precision of 0.015.
NAMED_ROWS = 1024
# Strengths of the ridge, as multiples of the mean eigenvalue.
STRENGTHS = torch.logspace(-6, 4, 41, dtype=torch.float64)


class ReadTokens(NamedTuple):
    """A stream of tokens, with the context after each token."""

    contexts: Tensor  # float32 `[n, context_dim]`
    tokens: Tensor  # int64 `[n]`, row numbers of embeddings


@torch.no_grad()
def decodability(
    train: ReadTokens, validation: ReadTokens, embeddings: Tensor, distances: Sequence[int], folds: int = 1
) -> list[dict[str, Any]]:
    """Measure by ridge regression how well a context encodes the token at each distance back.

    Let X be the centered contexts of `train`, and Y the embeddings of the tokens at a distance. The weights
    are W = (X'X + s I)^-1 X'Y = V (V'X'Y / (v + s)), where V are the eigenvectors and v the eigenvalues of
    X'X. V and v are computed once. The residual for each strength s follows from V'X'Y, without predictions
    of Y.

    Args:
        train, validation: the streams for fitting and for evaluation.
        embeddings: float32 `[distinct, hidden_size]`, one row per distinct token, all with the same norm.
        distances: numbers of tokens back. Distance 0 is the token that was read last.
        folds: number of parts of `validation` for which R² is also computed separately.

    Returns:
        a dict for each distance. `r2` is the explained share of the variance of the embeddings. `top1` is the
        share of positions at which the right token's embedding is the nearest to the decoded embedding.
        With more than one fold, `r2_by_fold` lists the R² of each part.
    """
    # Skip the first positions, because the most distant tokens would lie before the stream.
    skipped, results = max(distances), []
    center = train.contexts[skipped:].mean(dim=0)
    fitted, evaluated = (stream.contexts[skipped:] - center for stream in (train, validation))
    values, vectors = torch.linalg.eigh((fitted.T @ fitted).double())
    values = values.clamp(min=1e-9 * values.max().item())
    strengths = STRENGTHS * values.mean()
    shrinkage = values / (values + strengths[:, None])  # (strengths, context_dim)
    degrees_of_freedom = len(fitted) - 1 - shrinkage.sum(dim=1)
    for distance in distances:
        fitted_tokens, tokens = (
            stream.tokens[skipped - distance :][: -distance or None] for stream in (train, validation)
        )
        # Y has few distinct rows, so sums over positions are computed as sums over distinct tokens.
        counts = torch.bincount(fitted_tokens, minlength=len(embeddings)).to(embeddings)
        mean = counts @ embeddings / len(fitted_tokens)
        variance = (counts @ (embeddings - mean).square().sum(dim=1)).item()
        context_sums = embeddings.new_zeros(len(embeddings), len(center)).index_add_(0, fitted_tokens, fitted)
        projected = vectors.T @ (context_sums.T @ embeddings).double()  # V'X'Y: (context_dim, hidden_size)
        explained = projected.square().sum(dim=1) / values
        residual = variance - (explained * (2 * shrinkage - shrinkage.square())).sum(dim=1)
        strength = strengths[(residual / degrees_of_freedom.square()).argmin()]  # chosen by cross-validation
        weights = (vectors @ (projected / (values + strength)[:, None])).float()
        scores = evaluated[:NAMED_ROWS] @ (weights @ embeddings.T) + embeddings @ mean
        top1 = (scores.argmax(dim=1) == tokens[:NAMED_ROWS]).float().mean().item()
        truth = embeddings[tokens] - mean
        errors = truth - evaluated @ weights
        result = {"distance": distance, "r2": _explained(errors, truth), "top1": top1}
        if folds > 1:
            parts = zip(errors.tensor_split(folds), truth.tensor_split(folds), strict=True)
            result["r2_by_fold"] = [_explained(*part) for part in parts]
        results.append(result)
    return results


def _explained(errors: Tensor, truth: Tensor) -> float:
    return 1 - (errors.square().sum() / truth.square().sum()).item()


def last_remembered(by_distance: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the distance in tokens up to which R² stays above `SPAN_R2`, or None if it is never above."""
    remembered = takewhile(lambda row: row["r2"] > SPAN_R2, by_distance)
    return max((int(row["distance"]) for row in remembered), default=None)
