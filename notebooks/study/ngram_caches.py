"""Four caches of recent tokens beside a model: `python notebooks/study/ngram_caches.py RUN...`.

Prints the validation perplexity of finished runs with none, one, ... of them. A cache gives probability to
tokens that followed the same history among the tokens before; its weight is fitted on the same text.
"""

import sys

import numpy as np

import ctxkv_lib as ctxkv
from ctxkv_lib.measure import ngrams
from ctxkv_lib.measure.ngrams import Floats, Ids

NEAR = 100  # tokens that the second cache counts; the others count those of the window


def recent_shares(ids: Ids, window: int, order: int = 1) -> Floats:
    """Compute how often each token but the first followed its history among the up to `window` tokens before.

    Its history is the `order - 1` tokens before it. Of ids `[n]`, returns `[n - 1]` shares of the history's
    occurrences; NaN where it has none.
    """
    grams, of_history = ids, np.ones(len(ids) - 1)
    for length in range(2, order + 1):
        histories = np.roll(grams, 1)
        histories[: length - 1] = -np.arange(1, length)  # incomplete, like no other
        of_history = ngrams.recent_shares(histories, window)
        grams = np.unique(histories * (ids.max() + 1) + ids, return_inverse=True)[1]
    with np.errstate(invalid="ignore"):
        return ngrams.recent_shares(grams, window) / of_history


def with_cache(model: Floats, cache: Floats) -> Floats:
    """Mix a cache into a model's probabilities `[n]` where it has any, with the likeliest weight."""
    known = ~np.isnan(cache)
    weight = ngrams.cache_weight(model[known], cache[known]) if known.any() else 0.0
    return np.where(known, (1 - weight) * model + weight * cache, model)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        trained = ctxkv.open_run(path)
        stream = trained.stream("val")
        likely = [stream.token_losses().double().neg().exp().numpy()]
        ids = stream.ids.numpy().astype(np.int64)
        window = trained.run.config.model.context_window
        for reach, order in ((window, 1), (NEAR, 1), (window, 2), (window, 3)):
            likely.append(with_cache(likely[-1], recent_shares(ids, reach, order)))
        print(path, *(f"{np.exp(-np.log(each).mean()):.1f}" for each in likely))
