"""Intervals of the study: known cases, the spread over seeds, and what they refuse."""

import json

import numpy as np
import pytest
from intervals import RESULTS, Losses, difference, known_groups, losses, read_rows


def of(values, tokens):
    return Losses(np.asarray(values, dtype=float), np.asarray(tokens, dtype=float))


def test_a_difference_is_of_the_ratio_of_perplexities_weighted_by_tokens():
    draw = np.random.default_rng(1)
    tokens, other = draw.integers(10, 900, 30), draw.normal(5, 0.5, (1, 30))
    assert difference(of(other, tokens), of(other, tokens)) == (0, 0, 0)
    assert difference(of(other + np.log(1.1), tokens), of(other, tokens)) == pytest.approx((10, 10, 10))
    found, low, high = difference(of([[0.1, 0.3]], [1, 3]), of([[0, 0]], [1, 3]))
    assert found == pytest.approx(100 * np.expm1(0.25))
    assert (low, high) == pytest.approx((100 * np.expm1(0.1), 100 * np.expm1(0.3)))  # one drawn twice
    together = difference(of(other * 1.01, tokens), of(other, tokens), [0] * 30)
    assert together == pytest.approx((together.percent,) * 3)  # one group, one seed: nothing is drawn


def test_the_same_seeds_are_compared_in_pairs():
    """What seeds have in common is in neither the difference nor its interval."""
    levels = np.array([[0.0, 0.0], [3.0, 3.0], [9.0, 9.0]])
    both = of(levels + 2 + np.log(1.2), [1, 3]), of(levels + 2, [1, 3])
    assert difference(*both) == pytest.approx((20, 20, 20))
    _, low, high = difference(both[0], of(levels[:1], [1, 3]))  # other numbers of seeds: not in pairs
    assert low < -90
    assert high > 1e4


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    draw, held = np.random.default_rng(0), []
    for _ in range(60):
        own = 0.02 + draw.normal(0, 0.02, (3, 1)) + draw.normal(0, 0.05, (3, 40))
        _, low, high = difference(of(own, [100] * 40), of(np.zeros((3, 40)), [100] * 40))
        held.append(low < 100 * np.expm1(0.02) < high)
    assert 0.85 <= np.mean(held) <= 1


def test_kept_rows_have_the_token_counts_of_their_test_conversations():
    for file, count in (("answer", 10), ("fair", 50)):
        rows = read_rows(RESULTS / file / "sweep.json")
        known = [row for row in rows if "test_conversations" in row]
        assert known
        assert all(len(row["test_tokens"]) == len(row["test_conversations"]) == count for row in known)
        (row,) = [row for row in known if (row["samples"], row["seed"]) == (200, 42)][:1]
        mean = np.average(row["test_conversations"], weights=row["test_tokens"])
        assert np.exp(mean) == pytest.approx(row["test_ppl"], rel=1e-3)  # the counts are the right ones
    assert len(set(known_groups(np.ones(50)))) == 20


def row(seed, tokens):
    kept = {"variant": "a", "samples": 1, "seed": seed}
    return {**kept, "test_tokens": tokens, "test_conversations": [5.0, 6.0]}


def test_rows_of_other_test_conversations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a has rows of different test conversations"):
        losses([row(1, [3, 4]), row(2, [3, 5])], "a", 1)
    with pytest.raises(ValueError, match="compare rows of one test split"):
        difference(losses([row(1, [3, 4])], "a", 1), losses([row(1, [3, 5])], "a", 1))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"variant": "a", "samples": 1, "test_conversations": [5.0, 6.0]}]))
    with pytest.raises(ValueError, match=r"rows\.json has rows without the token counts"):
        read_rows(path)
    path.write_text((RESULTS / "answer/sweep.json").read_text())
    with pytest.raises(ValueError, match=r"rows\.json has no token counts"):
        read_rows(path)
