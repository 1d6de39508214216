"""Intervals of the study's rows: groups of speakers, token counts, and what is refused."""

import json

import numpy as np
import pytest
from intervals import RESULTS, Losses, difference, known_groups, losses, read_rows


def of(values, tokens):
    return Losses(np.asarray(values, dtype=float), np.asarray(tokens, dtype=float))


def test_groups_are_drawn_as_a_whole():
    rows = of([[0.1, 0.3, 0.2]], [1, 3, 2]), of([[0, 0, 0]], [1, 3, 2])
    percent, low, high = difference(*rows, [0, 0, 1])  # of 0.25 and 0.2
    assert percent == pytest.approx(difference(*rows).percent)
    assert (low, high) == pytest.approx((100 * np.expm1(0.2), 100 * np.expm1(0.25)))


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
