"""n-gram baselines on the same token ids: interpolated modified Kneser-Ney, without and with a cache.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (TR-10-98, 1998): three
discounts an order, continuation counts below the highest order. A stream is one sequence without boundaries,
as the model reads it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.counts import discounts

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

ORDERS = (2, 3, 4, 5)
CACHE_STEPS = 50  # of expectation maximisation, which finds the weight of the cache


def ngram_baselines(
    train: Ids, streams: Mapping[str, Ids], floors: Mapping[str, Floats], window: int
) -> dict[str, dict[str, Any]]:
    """Compute perplexities of the best n-gram model, without and with a unigram cache.

    `streams["val"]` chooses order, floor and the weight of the cache, as it chooses the model's best epoch: a
    baseline should rather be too good than too bad.

    Args:
        train: int64 `[n]`, what is counted.
        streams: `{"val": ids, ...}`, what is predicted, from its second token on.
        floors: `{name: float64 [vocab_size]}`, distributions to interpolate the unigrams with.
        window: tokens of history that the cache counts.

    Returns:
        `kneser_ney` and `kneser_ney_cache`: `order`, `floor`, `cache_weight` and each stream's `{name}_ppl`.
    """
    model = KneserNey(train, len(next(iter(floors.values()))))
    recent = {name: recent_shares(ids, window) for name, ids in streams.items()}
    rows: dict[str, list[dict[str, Any]]] = {"kneser_ney": [], "kneser_ney_cache": []}
    for floor, distribution in floors.items():
        found = {name: model.probabilities(ids, distribution) for name, ids in streams.items()}
        for order in ORDERS:
            likeliest = cache_weight(found["val"][order], recent["val"])
            for kind, weight in zip(rows, (0.0, likeliest), strict=True):
                mixed = {name: (1 - weight) * found[name][order] + weight * recent[name] for name in streams}
                ppls = {f"{name}_ppl": float(np.exp(-np.log(p).mean())) for name, p in mixed.items()}
                rows[kind].append({"order": order, "floor": floor, "cache_weight": weight, **ppls})
    return {kind: min(tried, key=lambda row: row["val_ppl"]) for kind, tried in rows.items()}


def recent_shares(ids: Ids, window: int) -> Floats:
    """Return the share of each token but the first among the up to `window` before it: float64 `[n - 1]`."""
    place = np.arange(len(ids))
    codes = ids * len(ids) + place  # by token, then by place
    ranks, since = np.sort(codes), np.maximum(place - window, 0)
    seen = np.searchsorted(ranks, codes) - np.searchsorted(ranks, codes - place + since)
    return (seen[1:] / (place - since)[1:]).astype(np.float64)


def cache_weight(model: Floats, cache: Floats) -> float:
    """Fit the weight of `cache` in the likeliest mixture of two models' probabilities `[n]`."""
    weight = 0.5
    for _ in range(CACHE_STEPS):
        share = weight * cache
        weight = float(np.mean(share / (share + (1 - weight) * model)))
    return weight


class Level(NamedTuple):
    """The n-grams of one order.

    Attributes:
        discounted: float64 `[n-grams]`, each count less its discount, over the total of its history.
        kept: float64 `[histories]`, the share of a history's probability that is left to the order below.
    """

    discounted: Floats
    kept: Floats

    def probabilities(self, grams: Ids, histories: Ids, below: Floats) -> Floats:
        """Interpolate n-grams, by index (-1: never seen), with the probabilities of the order below."""
        seen = np.where(grams >= 0, self.discounted[grams], 0)
        return seen + np.where(histories >= 0, self.kept[histories], 1) * below


def _level(counts: Ids, histories: Ids, num_histories: int) -> Level:
    """Discount the counts `[n-grams]`, given each n-gram's history, an index below `num_histories`."""
    taken = discounts(counts)[np.minimum(counts, 3)]
    total = np.bincount(histories, counts, num_histories)
    safe = np.maximum(total, 1)  # a history that only the first tokens have continues nothing
    kept = np.where(total > 0, np.bincount(histories, taken, num_histories) / safe, 1)
    return Level((counts - taken) / safe[histories], kept)


class KneserNey:
    """n-gram models of one stream, of every order up to the largest of `ORDERS`.

    The index of an n-gram is its place among the sorted codes of its order. Its code is `index of its history
    * vocabulary + last token`: counting is `np.unique`, lookup a binary search.
    """

    def __init__(self, ids: Ids, vocab_size: int) -> None:
        """Count `ids`, int64 `[n]`, each below `vocab_size`."""
        self.vocab_size = vocab_size
        self.codes: list[Ids] = []  # of each order from 1
        self.highest: list[Level] = []  # from plain counts: a model's own order
        self.lower: list[Level] = []  # from continuation counts: the orders below it
        grams, num_histories = np.zeros(len(ids) + 1, np.int64), 1  # order 0: nothing, before each token
        owners = grams
        for order in range(1, max(ORDERS) + 1):
            shorter, code = grams, grams[:-1] * vocab_size + ids[order - 1 :]
            codes, first, grams, counts = np.unique(code, True, True, True)
            if order > 1:  # how many different tokens each shorter n-gram came after
                after = np.bincount(shorter[1:][first], minlength=num_histories)
                self.lower.append(_level(after, owners, len(self.highest[-1].kept)))
            owners = codes // vocab_size
            self.codes.append(codes)
            self.highest.append(_level(counts, owners, num_histories))
            num_histories = len(codes)

    def probabilities(self, ids: Ids, floor: Floats) -> dict[int, Floats]:
        """Predict each token but the first with models of every order: `{order: float64 [n - 1]}`.

        Args:
            floor: float64 `[vocab_size]`, sums to 1; what unigrams are interpolated with.
        """
        targets = ids[1:]
        known = self._find(1, ids, np.zeros_like(ids))
        below = self.lower[0].probabilities(known[1:], np.zeros_like(targets), floor[targets])
        histories, found = known[:-1], {}
        for order, highest, lower in zip(ORDERS, self.highest[1:], [*self.lower[1:], None], strict=True):
            grams = self._find(order, targets, histories)
            found[order] = highest.probabilities(grams, histories, below)
            if lower:
                below = lower.probabilities(grams, histories, below)
                histories = np.concatenate([[-1], grams[:-1]])
        return found

    def _find(self, order: int, tokens: Ids, histories: Ids) -> Ids:
        """Find the indices of the n-grams with these histories and last tokens; -1 where there is none."""
        codes = self.codes[order - 1]
        wanted = histories * self.vocab_size + tokens
        place = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
        return np.where((histories >= 0) & (codes[place] == wanted), place, -1)
