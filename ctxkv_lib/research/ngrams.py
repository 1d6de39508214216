"""n-gram baselines on the same token ids: interpolated modified Kneser-Ney, alone and with caches.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (TR-10-98, 1998): three
discounts an order, continuation counts below the highest order. A stream is one sequence without boundaries,
as the model reads it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.counts import discounts, unigram_floor
from ..data.embeddings import corpus_counts, corpus_ids
from ..method.config import GPT2_VOCAB_SIZE
from ..method.model import ContextKV
from ..progress import say
from ..runs.caches import load_ids
from ..runs.config import ExperimentConfig
from ..runs.run_folder import RunFolder
from ..runs.testing import test_stream

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_COUNTED = 5_000_000  # training tokens; their n-grams take about 250 bytes each
ORDERS = (2, 3, 4, 5)
CACHE_STEPS = 50  # of expectation maximisation, which finds the weight of the cache
NEAR = 100  # tokens of history that the second of several caches counts


def ngram_baselines(
    train: Ids,
    streams: Mapping[str, Ids],
    floors: Mapping[str, Floats],
    window: int,
    starts: Mapping[str, Ids],
) -> dict[str, dict[str, Any]]:
    """Compute perplexities of the best n-gram model: alone, with a unigram cache, with several caches.

    The several are of single tokens, of those among the last `NEAR`, of pairs and of triples; each is mixed
    into what the caches before it left, where the history has occurred. `streams["val"]` chooses order, floor
    and weights, as it does the model's best epoch: the baseline is strong.

    Args:
        train: int64 `[n]`, the counted tokens.
        streams: `{"val": ids, ...}`, predicted from the second token on.
        floors: `{name: float64 [vocab_size]}`, distributions to interpolate the unigrams with.
        window: tokens of history that a cache counts.
        starts: of some streams, int64: the conversations' first tokens.

    Returns:
        `kneser_ney`, `kneser_ney_cache` and `kneser_ney_caches`: `order`, `floor`, `cache_weight` (of
        several, a list) and each stream's `{name}_ppl`; `{name}_conversations` with the mean loss in nats of
        each, where `starts` has them.
    """
    found = {name: kneser_ney(train, ids, floors) for name, ids in streams.items()}
    recent = {name: four_caches(ids, window) for name, ids in streams.items()}
    kinds = {"kneser_ney": 0, "kneser_ney_cache": 1, "kneser_ney_caches": 4}
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for floor, order in found["val"]:
        mixed, weights = with_caches({name: likely[floor, order] for name, likely in found.items()}, recent)
        for kind, number in kinds.items():
            weight = (0.0, weights[0], weights)[min(number, 2)]
            row = {"order": order, "floor": floor, "cache_weight": weight}
            rows[kind].append(row | _scores(mixed[number], starts))
    return {kind: min(tried, key=lambda row: row["val_ppl"]) for kind, tried in rows.items()}


def _scores(likely: Mapping[str, Floats], starts: Mapping[str, Ids]) -> dict[str, Any]:
    """Compute PPL, and mean losses of conversations, from each stream's probabilities `[n - 1]`."""
    losses = {name: -np.log(p) for name, p in likely.items()}
    apart = {name: np.split(losses[name], first[1:] - 1) for name, first in starts.items()}
    return {
        **{f"{name}_ppl": float(np.exp(loss.mean())) for name, loss in losses.items()},
        **{
            f"{name}_conversations": [float(loss.mean()) for loss in parts if len(loss)]
            for name, parts in apart.items()
        },
    }


def four_caches(ids: Ids, window: int) -> list[Floats]:
    """Compute the shares of the caches of tokens, of those among the last `NEAR`, of pairs and of triples."""
    return [recent_shares(ids, reach, n) for n, reach in ((1, window), (1, NEAR), (2, window), (3, window))]


def with_caches(
    models: dict[str, Floats], caches: Mapping[str, list[Floats]]
) -> tuple[list[dict[str, Floats]], list[float]]:
    """Mix caches into the probabilities of some streams, each into what those before it left.

    Returns:
        the probabilities with none, one, two ... of them; the weights, fitted on stream `val`.
    """
    mixed, weights = [models], []
    for number in range(len(caches["val"])):
        weight = cache_weight(mixed[-1]["val"], caches["val"][number])
        mixed.append({name: with_cache(p, caches[name][number], weight) for name, p in mixed[-1].items()})
        weights.append(weight)
    return mixed, weights


def recent_shares(ids: Ids, window: int, order: int = 1) -> Floats:
    """Compute how often each token but the first followed its history among the up to `window` tokens before.

    Args:
        ids: int64 `[n]`.
        order: the history is the `order - 1` tokens before it.

    Returns:
        float64 `[n - 1]`, a share of the history's occurrences; NaN where it has none.
    """
    place = np.arange(len(ids))
    since = np.maximum(place - window, 0)
    grams, total = ids, place - since
    for length in range(2, order + 1):
        histories = np.roll(grams, 1)
        histories[: length - 1] = -1 - place[: length - 1]  # incomplete, like no other
        total = _seen_since(histories, since)
        grams = np.unique(histories * (ids.max() + 1) + ids, return_inverse=True)[1]
    with np.errstate(invalid="ignore"):
        return (_seen_since(grams, since) / total)[1:]


def _seen_since(codes: Ids, since: Ids) -> Ids:
    """Count, for each of `codes` `[n]`, the equal ones before it from place `since` on."""
    place, code = np.arange(len(codes)), codes * len(codes)
    ranks = np.sort(code + place)  # by code, then by place
    return np.searchsorted(ranks, code + place) - np.searchsorted(ranks, code + since)


def with_cache(model: Floats, cache: Floats, weight: float) -> Floats:
    """Mix a cache with this weight into a model's probabilities `[n]`, where the cache has any."""
    return np.where(np.isnan(cache), model, (1 - weight) * model + weight * cache)


def cache_weight(model: Floats, cache: Floats) -> float:
    """Fit the weight of `cache` in the likeliest mixture of two models' probabilities `[n]`."""
    defined = ~np.isnan(cache)
    model, cache, weight = model[defined], cache[defined], 0.5 if defined.any() else 0.0
    for _ in range(CACHE_STEPS if weight else 0):
        share = weight * cache
        weight = float(np.mean(share / (share + (1 - weight) * model)))
    return weight


def kneser_ney(train: Ids, ids: Ids, floors: Mapping[str, Floats]) -> dict[tuple[str, int], Floats]:
    """Predict each token of a stream but the first with models that count `train`.

    The n-grams of both are numbered together: an n-gram's code is `number of its history * vocabulary + last
    token`, its number the place of that code among all.

    Returns:
        float64 `[n - 1]` by floor and order.
    """
    tokens, counted, place = np.concatenate([train, ids]), len(train), np.arange(len(ids))
    grams, below, found = np.zeros_like(tokens), {name: floor[ids] for name, floor in floors.items()}, {}
    for order in range(1, max(ORDERS) + 1):
        histories = np.roll(grams, 1)  # those of the first tokens of a stream are not used
        codes = histories * len(next(iter(floors.values()))) + tokens
        grams = np.unique(codes, return_inverse=True)[1]
        owners = np.zeros(grams.max() + 1, np.int64)
        owners[grams] = histories
        counts = np.bincount(grams[order - 1 : counted], minlength=len(owners))
        pairs = tokens[: max(0, counted - order)] * len(owners) + grams[order:counted]
        # Counted so that it sorts: numpy's hashes of such numbers collide.
        preceded, _ = np.unique(pairs, return_counts=True)
        continued = np.bincount(preceded % len(owners), minlength=len(owners))  # by how many different tokens
        own, complete = (grams[counted:], histories[counted:]), place >= order - 1
        for name, lower in below.items():
            if order in ORDERS:
                likely = _interpolated(counts, owners, *own, lower)
                found[name, order] = np.where(complete, likely, lower)[1:]
            below[name] = np.where(complete, _interpolated(continued, owners, *own, lower), lower)
    return found


def _interpolated(counts: Ids, owners: Ids, grams: Ids, histories: Ids, below: Floats) -> Floats:
    """Interpolate discounted counts with the probabilities `below`, of the order below.

    Args:
        counts, owners: int64 `[n-grams]`, how often each occurs, and the number of its history.
        grams, histories: int64 `[n]`, what is predicted, by number.
    """
    taken = discounts(counts)[np.minimum(counts, 3)]
    size = owners.max() + 1
    total = np.bincount(owners, counts, size)
    safe = np.maximum(total, 1)  # a history without a continuation leaves all to the order below
    kept = np.where(total > 0, np.bincount(owners, taken, size) / safe, 1)
    return (counts - taken)[grams] / safe[histories] + kept[histories] * below


def of_run(config: ExperimentConfig, folder: RunFolder, _: ContextKV) -> dict[str, Any]:
    """Count n-grams on the training tokens, and on those with the text that a token table is made from."""
    streams, starts = {split: load_ids(folder.caches, split) for split in ("train", "val")}, {}
    if stream := test_stream(config):
        streams["test"], starts["test"] = stream.ids, stream.starts.numpy()
    if len(streams["train"]) > MOST_COUNTED:
        say(f"No n-grams: {len(streams['train']):,} training tokens are more than {MOST_COUNTED:,}.")
        return {}
    size, window = GPT2_VOCAB_SIZE, config.model.context_window
    floors = {"uniform": np.full(size, 1 / size)}
    if (counts := corpus_counts(config.data)) is not None:
        floors["table text"] = unigram_floor(counts.weight.numpy())
    ids = {name: stream.numpy().astype(np.int64) for name, stream in streams.items()}
    train = ids.pop("train")
    found = ngram_baselines(train, ids, floors, window, starts)
    if config.data.table == "cooccurrence":
        text = corpus_ids(config.data)  # mapped: only the length of a large file is read
        apart = train if config.data.corpus == "own" else train[:0]  # else the text has that in it
        counted = len(text) + len(apart)
        if counted > MOST_COUNTED:
            say(f"No n-grams of the table's text: {counted:,} tokens are more than {MOST_COUNTED:,}.")
            return found
        known = np.concatenate([text.numpy(), apart])
        rows = ngram_baselines(known, ids, floors, window, starts)
        found |= {f"kneser_ney_table_{kind}": rows[f"kneser_ney_{kind}"] for kind in ("cache", "caches")}
    return found
