import math

import pytest
import torch

from ctxkv_lib.data import counts
from ctxkv_lib.data.counts import count_tokens, repeat_logit


@pytest.fixture(params=[3, 1000])
def ids(request, monkeypatch):
    monkeypatch.setattr(counts, "AT_ONCE", request.param)
    return torch.tensor([4, 4, 4, 0, 2, 2, 0, 4, 0, 2], dtype=torch.uint16)


def test_every_token_is_counted(ids):
    assert count_tokens(ids).tolist() == [3, 0, 3, 0, 4]
    assert count_tokens(ids, 7).tolist() == [3, 0, 3, 0, 4, 0, 0]
    assert count_tokens(ids, 2).tolist() == [3, 0, 3, 0, 4]


def test_repeats_are_measured_by_what_chance_would_give(ids):
    """Of the 9 pairs 3 are of one token; drawn by frequency, 0.34 of them would be."""
    assert repeat_logit(ids) == pytest.approx(math.log((3 + 1) / (9 * 0.34 + 1)))


def test_a_text_without_repeats_has_a_number_too():
    assert repeat_logit(torch.arange(50) % 5) == pytest.approx(math.log(1 / (49 * 0.2 + 1)))
