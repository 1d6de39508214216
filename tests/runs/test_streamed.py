"""Contexts that are computed when they are needed are the cached ones."""

from dataclasses import fields, replace
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, PreviousToken, tiny_ids, tiny_method
from ctxkv_lib.runs.streamed import Streamed, project_vocabulary, read_once, sampled

from ctxkv_lib.errors import UserError
from ctxkv_lib.method import contexts as method
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.config import Phase1Config
from ctxkv_lib.method.contexts import exact_contexts
from ctxkv_lib.runs import streamed
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.settings import LARGE_STREAM

COUNT, BATCH = 1007, 20  # positions


def everything(rows):
    return slice(0, rows)


@pytest.fixture
def streams(monkeypatch):
    """A model, a streamed stream, and the same one with all its contexts cached."""
    monkeypatch.setattr(streamed, "STRIDE", 16)
    monkeypatch.setattr(streamed, "BLOCK_TOKENS", 112)
    monkeypatch.setattr(streamed, "POOL_BLOCKS", 3)
    for module in (streamed, method):
        monkeypatch.setattr(module, "SCAN_TOKENS", 160)
    model, ids = tiny_method(), tiny_ids(COUNT + 1)
    block = model.context_block
    block.norm = torch.nn.Sequential(block.norm, torch.nn.Dropout(0.5))
    model.eval()
    with torch.no_grad():  # a block that forgets within a few tokens, as trained ones do
        block.linear.weight.mul_(0.3)
    inputs, beginning = project_vocabulary(model), torch.empty(101, TINY["context_dim"])
    contexts, _ = exact_contexts(block, inputs, ids[:-1], 1e-6)
    starts, error = read_once(model, ids, 1e-6, beginning)
    assert error <= 1e-6
    torch.testing.assert_close(beginning, contexts[:101], atol=1e-5, rtol=0)
    torch.testing.assert_close(starts, contexts[::16], atol=1e-5, rtol=0)
    return model.train(), Streamed(ids, starts, inputs, torch.float32), StreamCache(ids.int(), contexts)


def visited(windows, cached):
    """The positions of the stream that windows belong to, known by their contexts."""
    return torch.cdist(windows[:, 0], cached.contexts[1:]).argmin(dim=1)


def test_an_epoch_visits_every_position_once_with_what_is_cached_of_it(streams):
    model, made, cached = streams
    batches = list(made.epoch(1, 1, 0, BATCH, model, everything))
    assert (len(made), made.dtype) == (len(cached), cached.dtype)
    assert [len(batch) for batch in batches] == [BATCH] * 50 + [7]
    larger = replace(made, dtype=torch.bfloat16).epoch(1, 1, 0, 500, model, everything)  # than a block
    found = [(len(batch), batch.window.dtype) for batch in larger]
    assert found == [(n, torch.bfloat16) for n in (500, 500, 7)]
    positions = visited(torch.cat([batch.window for batch in batches]), cached)
    assert sorted(positions.tolist()) == list(range(COUNT))
    expected = cached.gather(positions, model.window)
    for field in fields(expected):
        if field.name != "embeddings":
            found = torch.cat([getattr(batch, field.name) for batch in batches])
            torch.testing.assert_close(found, getattr(expected, field.name), atol=1e-5, rtol=0)


def test_every_epoch_has_an_order_of_its_own_and_continues_anywhere(streams):
    model, made, cached = streams

    def windows(seed, number, done=0):
        return torch.cat([batch.window for batch in made.epoch(seed, number, done, BATCH, model, everything)])

    whole = windows(1, 1)
    orders = [visited(each, cached).tolist() for each in (whole, windows(1, 1), windows(1, 2), windows(2, 1))]
    assert orders[0] == orders[1]
    assert len({tuple(each) for each in orders}) == 3
    first = orders[0][:300]  # a pool of three blocks of 100
    assert len({position // 100 for position in first}) == 3
    assert first != sorted(first)
    for done in (20, 300, 320, 1000):
        assert torch.equal(windows(1, 1, done), whole[done:])
    assert not list(made.epoch(1, 1, COUNT, BATCH, model, everything))


def test_the_error_of_a_long_stream_is_the_largest_of_its_parts(monkeypatch):
    for module in (streamed, method):
        monkeypatch.setattr(module, "SCAN_TOKENS", 16)
    monkeypatch.setattr(streamed, "STRIDE", 16)
    monkeypatch.setattr(method, "segmented_scan", Mock(side_effect=[1, 3, 2] * 2))
    model, ids = tiny_method(), tiny_ids(49)
    assert exact_contexts(model.context_block, project_vocabulary(model), ids[:-1], 1.0)[1] == 3
    assert read_once(model, ids, 1.0, torch.empty(1, TINY["context_dim"]))[1] == 3


def test_large_streams_are_streamed_where_they_can_be():
    exact = build_config("offline")
    assert not exact.is_streamed(LARGE_STREAM)
    assert exact.is_streamed(LARGE_STREAM + 1)
    assert not exact.replace({"runtime.context_cache": "cached"}).is_streamed(LARGE_STREAM + 1)
    assert not exact.replace({"runtime.embedding_cache": "dense"}).is_streamed(LARGE_STREAM + 1)
    assert not exact.replace({"mixer": PreviousToken}).is_streamed(LARGE_STREAM + 1)
    assert not build_config("colab").is_streamed(LARGE_STREAM + 1)
    with pytest.raises(UserError, match=r"needs phase1\.context_method=exact.* \(here passes, gather"):
        build_config("colab", settings={"runtime.context_cache": "streamed"})


def test_phase_1_trains_on_even_samples_of_a_long_stream():
    ids = torch.arange(1000)
    few = Phase1Config(context_method="exact", max_tokens=350, batch_size=100)
    assert sampled(ids, few).tolist() == [*range(100), *range(450, 550), *range(900, 1000)]
    assert sampled(ids, replace(few, max_tokens=70)).tolist() == [*range(70)]
    for whole in (replace(few, max_tokens=1000), replace(few, context_method="passes")):
        assert torch.equal(sampled(ids, whole), ids)
