"""Tests of the probe on contexts whose memory is known, and against plain formulas."""

import math

import probe
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_method
from probe import distances, encoded, other_contexts, window_share

from ctxkv_lib.method.streams import Stream


@pytest.mark.parametrize("reach", [None, 0, 3, 6, 7, 50])
def test_the_share_counts_the_tokens_within_some_slots_span(reach):
    offsets = [0, 7, 14, 21, 28]
    held = sum(
        reach is not None and any(slot <= back <= slot + reach for slot in offsets) for back in range(35)
    )
    assert window_share(offsets, 35, reach) == pytest.approx(held / 35)


def test_a_run_is_probed_beside_untrained_blocks_and_halfway_through_what_is_read(trained, monkeypatch):
    state, fit, streams = torch.get_rng_state(), probe.decodability, []
    monkeypatch.setattr(probe, "decodability", lambda *given: streams.append(given[1]) or fit(*given))
    found = encoded(trained.model, trained.streams)
    assert torch.equal(streams[-1].contexts, trained.stream("val").contexts())  # after their tokens
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found["untrained"]) == ["0.1", "0.01"]
    for block in (found, *found["untrained"].values()):
        assert [row["distance"] for row in block["decodability"]] == distances(3, 12)
        assert 0 <= block["window_share"] <= 1
    monkeypatch.setattr(probe, "ROWS", {"train": 40, "val": 12})  # distances reach half of this
    found = encoded(trained.model, trained.streams)
    assert [row["distance"] for row in found["decodability"]] == distances(3, 7)


@pytest.mark.parametrize("count", [90, 20, 10])
def test_other_windows_are_those_of_positions_half_the_stream_away(count, monkeypatch):
    model, ids = tiny_method().eval(), torch.arange(count) * 2
    first = min(model.config.context_window, count - 2)
    stream = Stream(ids.int(), torch.randn(count, TINY["context_dim"]))
    found = other_contexts(model, stream)["changed"]
    positions = torch.arange(first, count - 1)
    half = (count - 1 - first) // 2
    own, far = (model.batch(stream, each).inputs[0] for each in (positions, positions.roll(-half)))
    losses = {}
    for name, window in {"own": own, "zero": own * 0, "elsewhere": far}.items():
        hidden, _ = model.apply_layer(
            model.embed(ids[positions]), window, torch.ones(window.shape[:2]).bool()
        )
        logits = model.logits(hidden, ids[positions])
        losses[name] = F.cross_entropy(logits, ids[positions + 1], reduction="none").double()
    for name, each in found.items():
        change = losses[name] - losses["own"]
        error = change.std(correction=0).item() / math.sqrt(len(change))
        assert each["ppl"] == pytest.approx(losses[name].mean().exp().item(), rel=1e-5)
        assert each["percent"] == pytest.approx(100 * change.mean().expm1().item(), rel=1e-3, abs=1e-3)
        assert each["error"] == pytest.approx(100 * change.mean().exp().item() * error, rel=1e-3)
    monkeypatch.setattr(probe, "POSITIONS", 5)  # a random sample
    assert other_contexts(model, stream)["positions"] == min(5, len(positions))
