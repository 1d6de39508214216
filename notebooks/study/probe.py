"""Measure what contexts encode, and whether the model uses it: `python notebooks/study/probe.py RUN...`.

Decodability is measured by ridge regressions, which predict the embedding of the token at t - d from the
context at t. They are fitted on one stream and evaluated on another, for the run's contexts and for contexts
of untrained blocks. Generalised cross-validation chooses the strength of the ridge for each distance d
(Golub, Heath and Wahba, 1979). Where contexts remember nothing, the weights shrink to zero.

Use is measured by the perplexity of the trained model when it reads wrong contexts at the same positions.
No model is trained for this.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ctxkv_lib as ctxkv
from ctxkv_lib.method.block import CONTEXT_WEIGHT_STD, ContextBlock
from ctxkv_lib.method.caches import Cache
from ctxkv_lib.method.contexts import distinct_rows, exact_contexts
from ctxkv_lib.method.model import ContextKV
from ctxkv_lib.method.scoring import perplexity
from ctxkv_lib.views.explore import elsewhere

# Number of tokens that are used, from the start of each stream.
ROWS = {"train": 10_000, "val": 5_000}
# Standard deviations of the weights of the untrained blocks.
UNTRAINED_STDS = (CONTEXT_WEIGHT_STD, 0.01)
# Largest error of any number in the contexts of the untrained blocks.
TOLERANCE = 1e-5
# A token counts as forgotten if its R² is not above this value.
SPAN_R2 = 0.01
# `top1` is computed at this many positions, which is enough for a precision of 0.015.
NAMED_ROWS = 1024
# Strengths of the ridge, as multiples of the mean eigenvalue.
STRENGTHS = torch.logspace(-6, 4, 41, dtype=torch.float64)
# The model reads wrong contexts at this many positions, all of which have a full window.
POSITIONS = 1024


class Stream(NamedTuple):
    """A stream of tokens, with the context after each token."""

    contexts: Tensor  # float32 `[n, context_dim]`
    tokens: Tensor  # int64 `[n]`, row numbers of embeddings


@torch.no_grad()
def encoded(model: ContextKV, caches: Mapping[str, Cache]) -> dict[str, Any]:
    """Measure on the CPU what cached contexts encode. Use only the model's token table and window.

    Args:
        caches: one cache per split. The regressions are fitted on "train" and evaluated on "val".

    Returns:
        a dict. `decodability` is a list of `{distance, r2, top1}`. `memory_span` is in tokens. `window_share`
        is the share of the window that lies within some slot's memory span. `untrained` has the same three
        values for untrained blocks; its keys are the standard deviations of their weights. `offsets` lists
        the offsets of the slots.
    """
    ids = [caches[split].ids[:-1][:rows].cpu() for split, rows in ROWS.items()]
    lengths = [len(stream) for stream in ids]
    embeddings, rows = (tensor.cpu() for tensor in distinct_rows(model, torch.cat(ids)))
    tokens, shape = rows.split(lengths), model.config
    # The window has at most half of a stream, so the other half remains for the fit.
    window = min(shape.context_window, *(1 + length // 2 for length in lengths))

    def measured(contexts: Sequence[Tensor]) -> dict[str, Any]:
        train, validation = map(Stream, contexts, tokens)
        by_distance = decodability(train, validation, embeddings, distances(shape.interval, window))
        span = memory_span(by_distance)
        covered = window_share(model.window.offsets, shape.context_window, span)
        return {"decodability": by_distance, "memory_span": span, "window_share": covered}

    cached = [caches[split].contexts[1 : n + 1] for split, n in zip(ROWS, lengths, strict=True)]
    untrained = {}
    for std in UNTRAINED_STDS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            block = ContextBlock(shape.context_dim, shape.hidden_size)
        block.linear.weight.mul_(std / CONTEXT_WEIGHT_STD)
        inputs = block.project_inputs(embeddings)
        untrained[f"{std:g}"] = measured([exact_contexts(block, inputs, n, TOLERANCE)[1:] for n in tokens])
    trained = measured([contexts.float().cpu() for contexts in cached])
    return {**trained, "untrained": untrained, "offsets": model.window.offsets}


def distances(interval: int, window: int) -> list[int]:
    """List all distances up to `interval`, and then distances that grow by half, up to `window`."""
    listed = list(range(min(interval, window - 1) + 1))
    while (further := max(listed[-1] + 1, 3 * listed[-1] // 2)) < window:
        listed.append(further)
    return listed


def decodability(
    train: Stream, validation: Stream, embeddings: Tensor, distances: Sequence[int]
) -> list[dict[str, float]]:
    """Measure by ridge regression how well a context encodes the token at each distance back.

    Let X be the centred contexts of `train` and Y the embeddings of the tokens at a distance. The weights are
    W = (X'X + s I)^-1 X'Y = V (V'X'Y / (v + s)), where V are the eigenvectors and v the eigenvalues of X'X. V
    and v are computed once. The residual for each strength s follows from V'X'Y, without predictions of Y.

    Args:
        train, validation: the streams for fitting and for evaluation.
        embeddings: float32 `[distinct, hidden_size]`, one row per distinct token, all with the same norm.
        distances: numbers of tokens back. Distance 0 is the token that was read last.

    Returns:
        a dict for each distance. `r2` is the explained share of the variance of the embeddings. `top1` is the
        share of positions at which the right token's embedding is the nearest to the decoded embedding.
    """
    # Skip the first positions, because the most distant tokens would lie before the stream.
    skipped, results = max(distances), []
    centre = train.contexts[skipped:].mean(dim=0)
    fitted, evaluated = (stream.contexts[skipped:] - centre for stream in (train, validation))
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
        context_sums = embeddings.new_zeros(len(embeddings), len(centre)).index_add_(0, fitted_tokens, fitted)
        projected = vectors.T @ (context_sums.T @ embeddings).double()  # V'X'Y: (context_dim, hidden_size)
        explained = projected.square().sum(dim=1) / values
        residual = variance - (explained * (2 * shrinkage - shrinkage.square())).sum(dim=1)
        strength = strengths[(residual / degrees_of_freedom.square()).argmin()]  # chosen by cross-validation
        weights = (vectors @ (projected / (values + strength)[:, None])).float()
        scores = evaluated[:NAMED_ROWS] @ (weights @ embeddings.T) + embeddings @ mean
        top1 = (scores.argmax(dim=1) == tokens[:NAMED_ROWS]).float().mean().item()
        truth = embeddings[tokens] - mean
        r2 = 1 - ((truth - evaluated @ weights).square().sum() / truth.square().sum()).item()
        results.append({"distance": distance, "r2": r2, "top1": top1})
    return results


def memory_span(by_distance: Sequence[dict[str, float]]) -> int | None:
    """Return the distance in tokens up to which R² stays above `SPAN_R2`, or None if it is never above."""
    remembered = takewhile(lambda row: row["r2"] > SPAN_R2, by_distance)
    return max((int(row["distance"]) for row in remembered), default=None)


def window_share(offsets: Sequence[int], window: int, span: int | None) -> float:
    """Compute the share of the `window` tokens before a position that lie within some slot's memory span."""
    read = {offset + behind for offset in offsets for behind in range(0 if span is None else span + 1)}
    return len(read & {*range(window)}) / window


@torch.no_grad()
def other_contexts(model: ContextKV, cache: Cache) -> dict[str, Any]:
    """Compute the perplexity if contexts are replaced by zeros or by contexts from elsewhere.

    Zero contexts never occur in training, so they harm even a model that ignores the content of contexts.
    Contexts from elsewhere come from half the stream away, usually from another conversation. They harm only
    a model that uses the content of contexts.

    Returns:
        a dict. `positions` is the number of positions. `changed` has the results for `zero` and `elsewhere`:
        the perplexity `ppl`, its increase `percent` compared with the run's own contexts, and the standard
        error `error` of this increase.
    """
    first = min(model.config.context_window, len(cache) - 1)
    # The fixed seed draws the same positions in all runs.
    seeded = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(cache) - first, generator=seeded)
    chosen = first + drawn[:POSITIONS].sort().values
    batch = model.batch(cache, chosen)
    own, present = batch.inputs
    away, _ = model.batch(cache, elsewhere(chosen, first, len(cache))).inputs

    def losses(contexts: Tensor) -> Tensor:
        hidden, _ = model.read(replace(batch, inputs=(contexts, present)))
        return model.losses(hidden, batch.tokens, batch.targets)[0].double()

    unchanged, changed = losses(own), {}
    for name, contexts in {"zero": torch.zeros_like(own), "elsewhere": away}.items():
        replaced = losses(contexts)
        ratio = perplexity((replaced - unchanged).mean().item())
        error = (replaced - unchanged).std(correction=0).item() / math.sqrt(len(unchanged))
        ppl = perplexity(replaced.mean().item())
        changed[name] = {"ppl": ppl, "percent": 100 * (ratio - 1), "error": 100 * ratio * error}
    return {"positions": len(chosen), "changed": changed}


if __name__ == "__main__":
    for opened in map(ctxkv.open_run, sys.argv[1:]):
        probed = encoded(opened.model, opened.caches) | other_contexts(opened.model, opened.caches["val"])
        print(f"{opened.run.path}: {json.dumps(probed, indent=2)}")
