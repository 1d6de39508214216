"""What Phase 2 reads of a stream is the same wherever and however it is held."""

from dataclasses import fields

import pytest
import torch
from conftest import TINY, tiny_method, tiny_stream

from ctxkv_lib.method.caches import StreamCache

COUNT = 59  # positions


def assert_equal(found, expected):
    for field in fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert ours is theirs or torch.equal(ours, theirs), field.name


def test_dense_embeddings_give_the_same_hidden_states():
    model, cache = tiny_method().eval(), tiny_stream(COUNT)
    dense = StreamCache(cache.ids, cache.contexts, model.embed(cache.ids[:-1]))
    positions = torch.tensor([0, 1, 2, 30, COUNT - 1])
    assert torch.equal(cache.attend(model, positions)[0], dense.attend(model, positions)[0])
    assert len(dense.embeddings) == len(dense) == COUNT
    assert dense.nbytes == cache.nbytes + COUNT * TINY["hidden_size"] * 4


def test_no_positions_are_no_batch():
    """A training that was stopped after the last step of an epoch has none left."""
    assert not list(tiny_stream(COUNT).batches(torch.arange(0), 13, tiny_method()))


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


@pytest.mark.parametrize("micro_batches", [1, 3, 7, 100])
def test_micro_batches_are_the_batch_in_order(micro_batches):
    batch = tiny_stream(COUNT).gather(torch.arange(7), tiny_method().window)
    parts = list(batch.split(micro_batches))
    assert len(parts) == min(micro_batches, 7)
    assert [i for _, rows in parts for i in range(7)[rows]] == list(range(7))
    for name in ("tokens", "window", "present", "targets"):
        assert torch.equal(torch.cat([getattr(part, name) for part, _ in parts]), getattr(batch, name))
