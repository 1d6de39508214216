"""Measure what contexts encode, and whether the model reads it: `python notebooks/study/probe.py RUN...`.

Decodability: ridge regressions predict the embedding of the token at t - d from the context at t. They are
fitted on one stream and evaluated on another, for the run's contexts and for contexts of untrained blocks.
Generalised cross-validation chooses the strength of the ridge for each distance (Golub, Heath and Wahba,
1979): where nothing is remembered, the weights shrink to zero.

Use: the perplexity of the trained model is computed at the same positions with other contexts. Nothing is
trained.
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

ROWS = {"train": 10_000, "val": 5_000}  # number of tokens that are decoded, from the start of each stream
UNTRAINED_STDS = (CONTEXT_WEIGHT_STD, 0.01)  # standard deviations of the untrained blocks' weights
TOLERANCE = 1e-5  # largest error of a component of the untrained blocks' contexts
SPAN_R2 = 0.01  # a token counts as forgotten if its R² is at most this
NAMED_ROWS = 1024  # number of positions for `top1`, enough for a precision of 0.015
STRENGTHS = torch.logspace(-6, 4, 41, dtype=torch.float64)  # multiples of the mean eigenvalue
POSITIONS = 1024  # number of positions with a full window at which other contexts are read


class Stream(NamedTuple):
    """A stream of tokens, with the context after each token."""

    contexts: Tensor  # float32 `[n, context_dim]`
    tokens: Tensor  # int64 `[n]`, rows of a table of embeddings


@torch.no_grad()
def encoded(model: ContextKV, caches: Mapping[str, Cache]) -> dict[str, Any]:
    """Measure on the CPU what cached contexts encode; only the model's table and window are used.

    Args:
        caches: caches by split; the regressions are fitted to "train" and evaluated on "val".

    Returns:
        `decodability`, a list of `{distance, r2, top1}`; `memory_span` in tokens; `window_share`, the share
        of the window that lies within some slot's memory span; `untrained`, the same values for untrained
        blocks, by the standard deviation of their weights; `offsets`, the offsets of the slots.
    """
    ids = [caches[split].ids[:-1][:rows].cpu() for split, rows in ROWS.items()]
    lengths = [len(stream) for stream in ids]
    embeddings, rows = (tensor.cpu() for tensor in distinct_rows(model, torch.cat(ids)))
    tokens, shape = rows.split(lengths), model.config
    window = min(shape.context_window, *(1 + length // 2 for length in lengths))  # half remain for the fit

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
    """List all distances up to an interval, and then distances that grow by half, within the window."""
    listed = list(range(min(interval, window - 1) + 1))
    while (further := max(listed[-1] + 1, 3 * listed[-1] // 2)) < window:
        listed.append(further)
    return listed


def decodability(
    train: Stream, validation: Stream, embeddings: Tensor, distances: Sequence[int]
) -> list[dict[str, float]]:
    """Measure by ridge regression how well a context encodes the token at each distance back.

    Let X be the centred contexts of `train` and Y the embeddings of the tokens at a distance. The weights are
    W = (X'X + s I)^-1 X'Y = V (V'X'Y / (v + s)), where V and v are the eigenvectors and eigenvalues of X'X,
    which are computed once. The residual for each strength s follows from V'X'Y without a prediction.

    Args:
        train, validation: the streams for fitting and for evaluation.
        embeddings: float32 `[distinct, hidden_size]`, all with the same norm.
        distances: 0 is the token just read.

    Returns:
        for each distance: `distance`; `r2`, the explained share of the embedding's variance; `top1`, the
        share of positions at which the right token is the nearest to the decoded embedding.
    """
    skipped, results = max(distances), []  # skip the first positions, which lack distant tokens
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
    """Return the distance in tokens up to which R² stays above `SPAN_R2`; None if no R² is above it."""
    remembered = takewhile(lambda row: row["r2"] > SPAN_R2, by_distance)
    return max((int(row["distance"]) for row in remembered), default=None)


def window_share(offsets: Sequence[int], window: int, span: int | None) -> float:
    """Compute the share of the `window` tokens before a position that lie within some slot's memory span."""
    read = {offset + behind for offset in offsets for behind in range(0 if span is None else span + 1)}
    return len(read & {*range(window)}) / window


@torch.no_grad()
def other_contexts(model: ContextKV, cache: Cache) -> dict[str, Any]:
    """Compute perplexity with contexts replaced by zeros, or by contexts from half the stream away.

    Zero contexts never occur in training, so they harm even a model that ignores the content of contexts.
    Contexts from elsewhere, usually another conversation, harm only a model that reads them.

    Returns:
        `positions`, the number of positions; and `changed`, which maps `zero` and `elsewhere` to `ppl`,
        `percent` (its increase over the run's own contexts) and `error` (the standard error of `percent`).
    """
    first = min(model.config.context_window, len(cache) - 1)
    seeded = torch.Generator().manual_seed(0)  # the same positions in all runs
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
