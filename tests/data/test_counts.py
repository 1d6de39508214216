import pytest
import torch

from ctxkv_lib.data import counts
from ctxkv_lib.data.counts import count_tokens


@pytest.fixture(params=[3, 1000])
def ids(request, monkeypatch):
    monkeypatch.setattr(counts, "AT_ONCE", request.param)
    return torch.tensor([4, 4, 4, 0, 2, 2, 0, 4, 0, 2], dtype=torch.uint16)


def test_every_token_is_counted(ids):
    assert count_tokens(ids).tolist() == [3, 0, 3, 0, 4]
    assert count_tokens(ids, 7).tolist() == [3, 0, 3, 0, 4, 0, 0]
    assert count_tokens(ids, 2).tolist() == [3, 0, 3, 0, 4]
