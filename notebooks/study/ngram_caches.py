"""Four caches of recent tokens beside a model: `python notebooks/study/ngram_caches.py RUN...`.

Prints the validation perplexity of finished runs with none, one, ... of them. A cache gives probability to
tokens that followed the same history among the tokens before; its weight is fitted on the same text.
"""

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ctxkv_lib as ctxkv
from ctxkv_lib.measure.ngrams import cache_weight

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

NEAR = 100  # tokens that the second cache counts; the others count those of the window


def recent_shares(ids: Ids, window: int, order: int = 1) -> Floats:
    """Compute how often each token but the first followed its history among the up to `window` tokens before.

    Its history is the `order - 1` tokens before it. Of ids `[n]`, returns `[n - 1]` shares of the history's
    occurrences; NaN where it has none.
    """
    place = np.arange(len(ids))
    since = np.maximum(place - window, 0)
    grams, total = ids, place - since
    for length in range(2, order + 1):
        histories = np.roll(grams, 1)
        histories[: length - 1] = -1 - place[: length - 1]  # incomplete, like no other
        total = seen_since(histories, since)
        grams = np.unique(histories * (ids.max() + 1) + ids, return_inverse=True)[1]
    with np.errstate(invalid="ignore"):
        return (seen_since(grams, since) / total)[1:]


def seen_since(codes: Ids, since: Ids) -> Ids:
    """Count, for each of `codes` `[n]`, the equal ones before it from place `since` on."""
    place, code = np.arange(len(codes)), codes * len(codes)
    ranks = np.sort(code + place)  # by code, then by place
    return np.searchsorted(ranks, code + place) - np.searchsorted(ranks, code + since)


def with_cache(model: Floats, cache: Floats) -> Floats:
    """Mix a cache into a model's probabilities `[n]` where it has any, with the likeliest weight."""
    known = ~np.isnan(cache)
    weight = cache_weight(model[known], cache[known]) if known.any() else 0.0
    return np.where(known, (1 - weight) * model + weight * cache, model)


@torch.no_grad()
def probabilities(trained: Any) -> Floats:
    """Compute what a run's model gives to each next token of its validation stream, `[n]`."""
    model, cache = trained.model.eval(), trained.caches["val"]
    batches = cache.batches(torch.arange(len(cache)), 512, model)
    return torch.cat([batch.scores(model)[0].cpu() for batch in batches]).double().neg().exp().numpy()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        trained = ctxkv.open_run(path)
        likely = [probabilities(trained)]
        ids = trained.caches["val"].ids.cpu().numpy().astype(np.int64)
        window = trained.run.config.model.context_window
        for reach, order in ((window, 1), (NEAR, 1), (window, 2), (window, 3)):
            likely.append(with_cache(likely[-1], recent_shares(ids, reach, order)))
        print(path, *(f"{np.exp(-np.log(each).mean()):.1f}" for each in likely))
