"""Dropout in micro-batches and shards: that of the whole batch where it has a row for each position."""

import pytest
import torch
import torch.nn.functional as F

from ctxkv_lib.runs.micro_batches import RowsOfDropout


def dropped(values):
    torch.manual_seed(0)
    return F.dropout(values, 0.5, training=True)


def test_dropout_of_a_row_for_each_position_is_that_of_the_whole_batch():
    with RowsOfDropout(6, slice(2, 5)):
        found = dropped(torch.ones(3, 4))
    assert torch.equal(found, dropped(torch.ones(6, 4))[2:5])


@pytest.mark.parametrize("shape", [(12, 4), (4, 3, 2)])  # slots flattened into rows, or in front of them
def test_other_dropout_is_drawn_as_ever(shape):
    with RowsOfDropout(6, slice(2, 5)):
        found = dropped(torch.ones(shape))
    assert torch.equal(found, dropped(torch.ones(shape)))
