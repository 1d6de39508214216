"""Tests of the probe on contexts whose memory is known, and against plain formulas."""

import math

import probe
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_method
from probe import (
    STRENGTHS,
    Stream,
    decodability,
    distances,
    encoded,
    memory_span,
    other_contexts,
    window_share,
)

from ctxkv_lib.method.caches import Cache

HELD = 3  # number of tokens that the contexts below encode


def embeddings():
    return F.layer_norm(torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), (12,))


def stream(count, seed):
    """Return random tokens, and contexts that consist of the last `HELD` embeddings, noise and a zero."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (count,), generator=draw)
    rows = F.pad(tokens, (HELD - 1, 0))
    contexts = torch.cat([embeddings()[rows[HELD - 1 - d : len(rows) - d]] for d in range(HELD)], dim=1)
    contexts += 0.05 * torch.randn(contexts.shape, generator=draw)
    return Stream(F.pad(contexts, (0, 1)), tokens)


def test_only_what_contexts_encode_is_decoded():
    found = decodability(stream(2000, 1), stream(800, 2), embeddings(), range(6))
    assert [row["distance"] for row in found] == list(range(6))
    assert all(row["r2"] > 0.95 and row["top1"] == 1 for row in found[:HELD])
    assert all(abs(row["r2"]) < 0.01 and row["top1"] < 0.1 for row in found[HELD:])
    assert memory_span(found) == HELD - 1


def test_decodability_is_that_of_a_plain_ridge_regression():
    train, held_out, table, distance = stream(300, 1), stream(200, 2), embeddings(), 2
    sides = [
        (side.contexts[distance:].double(), table[side.tokens[:-distance]].double())
        for side in (train, held_out)
    ]
    (x, y), (new_x, new_y) = sides
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y, new_x, new_y = x - mean_x, y - mean_y, new_x - mean_x, new_y - mean_y
    gram = x.T @ x
    scores = []
    for strength in STRENGTHS * gram.trace() / len(gram):
        hat = x @ torch.linalg.solve(gram + strength * torch.eye(len(gram)), x.T)
        scores.append(((y - hat @ y).square().sum() / (len(x) - 1 - hat.trace()) ** 2, strength))
    best = min(scores)[1]
    weights = torch.linalg.solve(gram + best * torch.eye(len(gram)), x.T @ y)
    expected = 1 - (new_y - new_x @ weights).square().sum() / new_y.square().sum()
    (found,) = decodability(train, held_out, table, [distance])
    assert found["r2"] == pytest.approx(expected.item(), abs=1e-5)


def test_the_memory_span_ends_at_the_first_forgotten_distance():
    rows = [{"distance": d, "r2": r2, "top1": 0.0} for d, r2 in ((0, 0.5), (1, 0.02), (2, 0.005), (4, 0.3))]
    assert memory_span(rows) == 1
    assert memory_span(rows[2:]) is None


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
    found = encoded(trained.model, trained.caches)
    assert torch.equal(streams[-1].contexts, trained.stream("val").contexts())  # after their tokens
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found["untrained"]) == ["0.1", "0.01"]
    for block in (found, *found["untrained"].values()):
        assert [row["distance"] for row in block["decodability"]] == distances(3, 12)
        assert 0 <= block["window_share"] <= 1
    monkeypatch.setattr(probe, "ROWS", {"train": 40, "val": 12})  # distances reach half of this
    found = encoded(trained.model, trained.caches)
    assert [row["distance"] for row in found["decodability"]] == distances(3, 7)


@pytest.mark.parametrize("count", [90, 20, 10])
def test_other_windows_are_those_of_positions_half_the_stream_away(count, monkeypatch):
    model, ids = tiny_method().eval(), torch.arange(count) * 2
    first = min(model.config.context_window, count - 2)
    cache = Cache(ids.int(), torch.randn(count, TINY["context_dim"]))
    found = other_contexts(model, cache)["changed"]
    positions = torch.arange(first, count - 1)
    half = (count - 1 - first) // 2
    own, far = (model.batch(cache, each).inputs[0] for each in (positions, positions.roll(-half)))
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
    assert other_contexts(model, cache)["positions"] == min(5, len(positions))
