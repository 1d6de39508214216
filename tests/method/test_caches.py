"""What Phase 2 reads of a stream is the same wherever and however it is held."""

from dataclasses import fields

import pytest
import torch
from conftest import tiny_method, tiny_stream

from ctxkv_lib.method.caches import StreamCache


def assert_equal(found, expected):
    for field in fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert ours is theirs or torch.equal(ours, theirs), field.name


def test_no_positions_are_no_batch():
    """A training that was stopped after the last step of an epoch has none left."""
    assert not list(tiny_stream(59).batches(torch.arange(0), 13, tiny_method()))


@pytest.mark.parametrize("anchor", ["current", "grid"])
def test_conversations_read_apart_are_streams_of_their_own(anchor):
    window, parts = tiny_method(anchor=anchor).window, [tiny_stream(20), tiny_stream(11)]
    joined = StreamCache(
        torch.cat([parts[0].ids[:-1], parts[1].ids]),
        torch.cat([parts[0].contexts, parts[1].contexts[1:]]),
        begins=torch.tensor([0] * 20 + [20] * 11),
    )
    first, second = joined.gather(torch.arange(19), window), joined.gather(torch.arange(20, 31), window)
    assert_equal(first, parts[0].gather(torch.arange(19), window))
    assert_equal(second, parts[1].gather(torch.arange(11), window))
