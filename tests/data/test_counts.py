import numpy as np
import pytest
import torch

from ctxkv_lib.data import counts
from ctxkv_lib.data.counts import count_tokens, unigram_floor

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("at_once", [3, 1000])
def test_every_token_is_counted(monkeypatch, at_once):
    monkeypatch.setattr(counts, "AT_ONCE", at_once)
    ids = torch.tensor([4, 4, 4, 0, 2, 2, 0, 4, 0, 2], dtype=torch.uint16)
    assert count_tokens(ids, 7).tolist() == [3, 0, 3, 0, 4, 0, 0]


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        # Four counts of 1, two of 2, one each of 3 and 4: Y = 4 / (4 + 2 * 2) = 1/2; 1 - 2 Y 2/4, and so on.
        ([1, 1, 1, 1, 2, 2, 3, 4, 0, 0], [0.5, 0.5, 0.5, 0.5, 1.25, 1.25, 1.0, 1.0, 0, 0]),
        ([5, 0, 0, 0], [1.5, 0, 0, 0]),  # the formula gives none
        ([0, 0], [0, 0]),
    ],
)
def test_unigrams_are_discounted_towards_equal_shares(found, taken):
    total = sum(found)
    kept = sum(taken) / total if total else 1
    expected = [(n - less) / max(total, 1) + kept / len(found) for n, less in zip(found, taken, strict=True)]
    floor = unigram_floor(np.array(found))
    assert floor == pytest.approx(expected)
    assert floor.sum() == pytest.approx(1)
