"""Decodability of contexts whose memory is known."""

import pytest
import torch

from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.windows import Window
from ctxkv_lib.research.decodability import (
    STRENGTHS,
    Stream,
    centroid,
    coverage,
    decodability,
    mean_decodability,
    memory_span,
)

HELD = 3  # tokens that the contexts below encode


def embeddings():
    rows = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.layer_norm(rows, (12,))


def stream(count, seed):
    """Random tokens, and contexts: the last `HELD` embeddings side by side, with noise, and a constant."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (count,), generator=draw)
    rows = torch.cat([torch.zeros(HELD - 1, dtype=torch.int64), tokens])
    contexts = torch.cat([embeddings()[rows[HELD - 1 - d : len(rows) - d]] for d in range(HELD)], dim=1)
    contexts += 0.05 * torch.randn(contexts.shape, generator=draw)
    return Stream(torch.nn.functional.pad(contexts, (0, 1)), tokens)


def test_only_what_contexts_encode_is_decoded_and_the_mean_of_the_last_tokens():
    train, held_out = stream(2000, 1), stream(800, 2)
    found = decodability(train, held_out, embeddings(), range(6))
    assert [row["distance"] for row in found] == list(range(6))
    assert all(row["r2"] > 0.95 and row["top1"] == 1 for row in found[:HELD])
    assert all(abs(row["r2"]) < 0.01 and row["top1"] < 0.1 for row in found[HELD:])
    assert memory_span(found) == HELD - 1
    assert mean_decodability(train, held_out, embeddings(), HELD) > 0.95
    assert 0.3 < mean_decodability(train, held_out, embeddings(), 2 * HELD) < 0.7


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


@pytest.mark.parametrize("anchor", ["current", "grid"])
@pytest.mark.parametrize("reach", [None, 0, 3, 6, 7, 50])
def test_coverage_counts_the_tokens_within_some_slots_span(anchor, reach):
    shape = ModelConfig(interval=7, max_contexts=5, anchor=anchor)
    held, window = 0, Window(shape)
    for position in range(70, 77):
        slots = window.slots(torch.tensor(position)).tolist()
        for token in range(position - 34, position + 1):
            held += reach is not None and any(token <= slot <= token + reach for slot in slots)
    assert coverage(shape, window, reach) == pytest.approx(held / (7 * 35))


def test_the_centroid_is_a_share():
    rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    assert centroid(rows) < 0.1
    assert centroid(rows * 0 + rows[0]) == pytest.approx(1)
