"""Modified Kneser-Ney smoothing equals the published formula, which is computed here with dictionaries."""

from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import get_args
from unittest.mock import MagicMock

import numpy as np
import pytest

from ctxkv_lib.data.config import Split
from ctxkv_lib.data.conversations import load_conversations
from ctxkv_lib.data.kneser_ney import FALLBACK_DISCOUNTS, discounts, smoothed_unigram
from ctxkv_lib.data.tokens import train_stream
from ctxkv_lib.measure import ngrams
from ctxkv_lib.measure.ngrams import ORDERS, kneser_ney, ngram_baselines, recent_shares

VOCABULARY = 150


def stream(count, seed=1):
    """Return tokens with skewed frequencies and repetitions, as in text; token 0 never occurs."""
    draw = np.random.default_rng(seed)
    tokens = [1, 2, 3, 4]
    for _ in range(count - 4):
        repeat = draw.random() < 0.6
        tokens.append(
            tokens[-draw.integers(2, 5)] if repeat else int((VOCABULARY - 1) * draw.random() ** 3) + 1
        )
    return np.array(tokens, dtype=np.int64)


class ByTheFormula:
    """Chen and Goodman's formulas, computed one probability at a time."""

    def __init__(self, tokens, order, prior):
        tokens = tuple(tokens.tolist())
        self.order, self.prior = order, prior
        self.counts = {order: Counter(tokens[i : i + order] for i in range(len(tokens) - order + 1))}
        for lower in range(1, order):  # N1+(. gram): number of different tokens before the gram
            longer = {tokens[i : i + lower + 1] for i in range(len(tokens) - lower)}
            self.counts[lower] = Counter(gram[1:] for gram in longer)
        self.taken = {n: self.of(counts) for n, counts in self.counts.items()}
        self.continuing = {n: defaultdict(dict) for n in self.counts}
        for n, counts in self.counts.items():
            for gram, count in counts.items():
                self.continuing[n][gram[:-1]][gram[-1]] = count

    @staticmethod
    def of(counts):
        n = Counter(counts.values())
        y = n[1] / (n[1] + 2 * n[2])
        return {i: i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)}

    def probability(self, history, token):
        if len(history) >= self.order:
            history = history[len(history) - self.order + 1 :]
        n = len(history) + 1
        below = self.probability(history[1:], token) if n > 1 else self.prior[token]
        counts = self.continuing[n].get(history, {})
        total = sum(counts.values())
        if not total:
            return below
        taken = self.taken[n]
        seen = counts.get(token, 0)
        left = sum(taken[min(count, 3)] for count in counts.values())
        return (seen - (taken[min(seen, 3)] if seen else 0)) / total + left / total * below


FLOOR = np.random.default_rng(3).dirichlet(np.ones(VOCABULARY))


@pytest.mark.parametrize("order", ORDERS)
def test_kneser_ney_is_the_published_formula(order):
    train, unseen = np.concatenate([[9], stream(900), [9]]), [0, 0, 0, 0]
    other = np.concatenate([stream(120, seed=2), unseen, train[-4:], [5], train[:5]])
    found = kneser_ney(train, other, {"": FLOOR})["", order]
    plain = ByTheFormula(train, order, FLOOR)
    expected = [
        plain.probability(tuple(other[max(0, at - order + 1) : at].tolist()), other[at])
        for at in range(1, len(other))
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_users_own_text_is_counted_once(tiny_config, tokenizer, monkeypatch):
    config = tiny_config.replace({"data.table": "cooccurrence", "data.corpus": "chitchat+own"})
    streams = {
        split: train_stream(load_conversations(config.data, split), tokenizer) for split in get_args(Split)
    }
    counted = []
    monkeypatch.setattr(ngrams, "ngram_baselines", lambda *given: counted.append(given) or MagicMock())
    ngrams.ngrams_of_run(SimpleNamespace(run=SimpleNamespace(config=config), tokens=streams.get))
    assert {window for _, _, _, window, _ in counted} == {config.model.context_window}
    train, with_table = (text.tolist() for text, *_ in counted)
    found = [at for at in range(len(with_table)) if with_table[at : at + len(train)] == train]
    assert len(found) == 1


def test_counts_too_few_for_the_formula_get_fixed_discounts():
    assert discounts(np.array([1, 1, 2, 7])).tolist() == [0, *FALLBACK_DISCOUNTS]
    tiny = kneser_ney(np.array([1, 2, 3, 1]), np.array([1, 2, 3, 4]), {"": np.full(5, 0.2)})
    assert all(np.isfinite(p).all() and (p > 0).all() for p in tiny.values())


def test_a_cache_counts_the_window_before_each_token():
    ids, window = stream(200), 30
    expected = [np.mean(ids[max(0, at - window) : at] == ids[at]) for at in range(1, len(ids))]
    np.testing.assert_array_equal(recent_shares(ids, window), expected)


def test_the_best_order_and_prior_are_chosen_on_validation_and_losses_kept_by_conversation():
    train, val, test = stream(900), stream(200, seed=2), stream(200, seed=3)
    priors = {
        "uniform": np.full(VOCABULARY, 1 / VOCABULARY),
        "text": smoothed_unigram(np.bincount(train, minlength=VOCABULARY)),
    }
    assert priors["text"].sum() == pytest.approx(1)
    streams, starts = (
        {"val": val, "test": test},
        {"test": np.array([0, 1, 50, 120])},
    )  # no token of the first conversation is predicted
    both = ngram_baselines(train, streams, priors, 50, starts)
    found = [kneser_ney(train, ids, priors) for ids in (val, test)]
    ppls = {key: [np.exp(-np.log(each[key]).mean()) for each in found] for key in found[0]}
    best = both["kneser_ney"]
    assert (best["prior"], best["order"]) == min(ppls, key=ppls.get)
    assert [best["val_ppl"], best["test_ppl"]] == pytest.approx(min(ppls.values()))
    assert both["kneser_ney_cache"]["val_ppl"] < best["val_ppl"]
    for row in both.values():
        loss = np.average(row["test_conversations"], weights=[49, 70, 80])
        assert loss == pytest.approx(np.log(row["test_ppl"]))
