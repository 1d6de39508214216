"""Compute n-gram baselines: interpolated modified Kneser-Ney models with and without a unigram cache.

Each order has three discounts, and orders below the highest use continuation counts, as in Chen and Goodman,
"An empirical study of smoothing techniques for language modeling" (TR-10-98, 1998). The baselines read the
same token ids as the model and, like the model, ignore the boundaries between conversations.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.kneser_ney import discounts, smoothed_unigram
from ..data.token_table import token_counts
from ..method.config import GPT2_VOCAB_SIZE
from ..progress import print_on_terminal
from ..runs.opened import STREAM_SPLITS, OpenRun

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

# Maximum number of tokens from which n-grams are counted. The counts take about 250 bytes per token.
MOST_COUNTED = 5_000_000
ORDERS = (2, 3, 4, 5)
# Steps of the expectation maximization that fits the weight of the unigram cache.
CACHE_STEPS = 50


def ngrams_of_run(opened: OpenRun) -> dict[str, Any]:
    """Compute the entry `ngrams` of a run's summary.

    Returns:
        `kneser_ney` and `kneser_ney_cache`, the results of `ngram_baselines` for the training tokens. If the
        token table is computed from text, `kneser_ney_table_cache` is the baseline that also counts this
        text. A baseline is missing if it would count more than `MOST_COUNTED` tokens.
    """
    data, starts = opened.run.config.data, {}
    streams = {
        name: opened.tokens(split)
        for name, split in STREAM_SPLITS.items()
        if getattr(data, data.size_setting(split))
    }
    if "test" in streams:
        starts["test"] = streams["test"].starts.numpy()
    ids = {name: stream.ids.numpy().astype(np.int64) for name, stream in streams.items()}
    train, size = ids.pop("train"), GPT2_VOCAB_SIZE
    priors = {"uniform": np.full(size, 1 / size)}
    texts = {"kneser_ney": train}
    if data.reads_corpus:
        corpus = opened.tokens("corpus")
        priors["table text"] = smoothed_unigram(token_counts(corpus).numpy())
        if data.table == "cooccurrence":
            # With `data.corpus=chitchat+own`, the corpus already contains the training text.
            missing = train if data.corpus == "own" else train[:0]
            texts["kneser_ney_table"] = np.concatenate([corpus.ids.numpy(), missing])
    results: dict[str, Any] = {}
    for name, counted in texts.items():
        if len(counted) > MOST_COUNTED:
            print_on_terminal(f"No n-grams of {len(counted):,} tokens: the limit is {MOST_COUNTED:,}.")
            continue
        rows = ngram_baselines(counted, ids, priors, opened.run.config.model.context_window, starts)
        results[f"{name}_cache"] = rows["kneser_ney_cache"]
        if name == "kneser_ney":  # of the two that count the table's text, only the stronger one is kept
            results[name] = rows["kneser_ney"]
    return results


def ngram_baselines(
    train: Ids,
    streams: Mapping[str, Ids],
    priors: Mapping[str, Floats],
    window: int,
    starts: Mapping[str, Ids],
) -> dict[str, dict[str, Any]]:
    """Compute the perplexities of the best n-gram models with and without a unigram cache.

    Args:
        train: int64 `[n]`, the token ids from which n-grams are counted.
        streams: `{"val": ids, ...}`, the token ids to predict; the first token is not predicted. The order,
            the prior and the weight of the cache are chosen on "val", like the model's best epoch.
        priors: `{name: float64 [vocab_size]}`, distributions to interpolate with the unigrams.
        window: number of preceding tokens that the cache counts.
        starts: for some of the streams, the index of each conversation's first token, int64.

    Returns:
        `kneser_ney` and `kneser_ney_cache`, each with `order`, `prior`, `cache_weight` and `{name}_ppl` for
        each stream. For each stream in `starts`, `{name}_conversations` lists the mean loss per token of
        each conversation in nats.
    """
    models = {name: kneser_ney(train, ids, priors) for name, ids in streams.items()}
    recent = {name: recent_shares(ids, window) for name, ids in streams.items()}
    rows: dict[str, list[dict[str, Any]]] = {"kneser_ney": [], "kneser_ney_cache": []}
    for prior, order in models["val"]:
        fitted = cache_weight(models["val"][prior, order], recent["val"])
        for kind, weight in zip(rows, (0.0, fitted), strict=True):
            row: dict[str, Any] = {"order": order, "prior": prior, "cache_weight": weight}
            for name, share in recent.items():
                losses = -np.log((1 - weight) * models[name][prior, order] + weight * share)
                row[f"{name}_ppl"] = float(np.exp(losses.mean()))
                if name in starts:
                    parts = np.split(losses, starts[name][1:] - 1)
                    row[f"{name}_conversations"] = [float(part.mean()) for part in parts if len(part)]
            rows[kind].append(row)
    return {kind: min(tried, key=lambda row: row["val_ppl"]) for kind, tried in rows.items()}


def recent_shares(ids: Ids, window: int) -> Floats:
    """Return the share of each token (except the first) among the `window` tokens before it: `[n - 1]`."""
    place = np.arange(len(ids))
    since, codes = np.maximum(place - window, 0), ids * len(ids)
    ranks = np.sort(codes + place)  # sorted by token and place
    seen = np.searchsorted(ranks, codes + place) - np.searchsorted(ranks, codes + since)
    return seen[1:] / (place - since)[1:]


def cache_weight(model: Floats, cache: Floats) -> float:
    """Fit the weight of `cache` in a mixture of `cache` and `model` (each `[n]`) by maximum likelihood."""
    weight = 0.5
    for _ in range(CACHE_STEPS):
        share = weight * cache
        weight = float(np.mean(share / (share + (1 - weight) * model)))
    return weight


def kneser_ney(train: Ids, ids: Ids, priors: Mapping[str, Floats]) -> dict[tuple[str, int], Floats]:
    """Compute the probability of each token of `ids` (except the first) from n-gram counts of `train`.

    The n-grams of `train` and `ids` are numbered together, separately for each order. A token's number is its
    rank among the tokens that occur. A longer n-gram is described by a pair: the number of its history (all
    tokens but the last) and its last token. The n-gram's own number is the rank of this pair. For example, if
    the token `a` has number 0, then `a b` is the pair (0, b). If this pair has rank 5, then the number of
    `a b` is 5, and `a b a` is the pair (5, a).

    Returns:
        the probabilities by prior and order, each float64 `[n - 1]`.
    """
    tokens, count, place = np.concatenate([train, ids]), len(train), np.arange(len(ids))
    lower = {name: prior[ids] for name, prior in priors.items()}  # probabilities for the order below
    numbers, probabilities = np.zeros_like(tokens), {}
    for order in range(1, max(ORDERS) + 1):
        # The first tokens of a stream get wrong histories here, but their histories are not used.
        histories = np.roll(numbers, 1)
        codes = histories * len(next(iter(priors.values()))) + tokens
        numbers = np.unique(codes, return_inverse=True)[1]
        history_of = np.zeros(numbers.max() + 1, np.int64)
        history_of[numbers] = histories
        size = len(history_of)
        counts = np.bincount(numbers[order - 1 : count], minlength=size)
        # Below the highest order, an n-gram counts once for each different token before it.
        # So each pair of a preceding token and an n-gram is kept only once.
        # With `return_counts`, numpy sorts the pairs. Hashing them would be slow, since the hashes collide.
        before = tokens[: max(0, count - order)]
        pairs, _ = np.unique(before * size + numbers[order:count], return_counts=True)
        continuations = np.bincount(pairs % size, minlength=size)
        predicted, complete = (numbers[count:], histories[count:]), place >= order - 1
        for name, below in lower.items():
            if order in ORDERS:
                highest = _interpolated(counts, history_of, *predicted, below)
                probabilities[name, order] = np.where(complete, highest, below)[1:]
            interpolated = _interpolated(continuations, history_of, *predicted, below)
            lower[name] = np.where(complete, interpolated, below)
    return probabilities


def _interpolated(counts: Ids, history_of: Ids, grams: Ids, histories: Ids, below: Floats) -> Floats:
    """Interpolate discounted counts with `below`, the probabilities for the next lower order.

    `counts` and `history_of`, int64 `[n-grams]`, give the count of each n-gram and the number of its history.
    `grams` and `histories`, int64 `[n]`, give the numbers of the n-grams to predict and of their histories.
    """
    taken = discounts(counts)[np.minimum(counts, 3)]
    size = history_of.max() + 1
    total = np.bincount(history_of, counts, size)
    # Avoid a division by 0. A history without a continuation gives all its weight to the lower order.
    safe = np.maximum(total, 1)
    left = np.where(total > 0, np.bincount(history_of, taken, size) / safe, 1)
    return (counts - taken)[grams] / safe[histories] + left[histories] * below
