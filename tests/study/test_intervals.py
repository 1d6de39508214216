"""Intervals of the study's rows: groups of speakers, token counts, and what is refused."""

import json

import pytest
from intervals import RESULTS, difference, losses, read_rows


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
