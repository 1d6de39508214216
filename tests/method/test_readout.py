"""Tests of the readout on contexts whose memory is known, and against plain formulas."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxkv_lib import memory_span as measured_span
from ctxkv_lib.errors import UserError
from ctxkv_lib.method.readout import STRENGTHS, ReadTokens, decodability, last_remembered

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
    return ReadTokens(F.pad(contexts, (0, 1)), tokens)


def test_only_what_contexts_encode_is_decoded():
    found = decodability(stream(2000, 1), stream(800, 2), embeddings(), range(6))
    assert [row["distance"] for row in found] == list(range(6))
    assert all(row["r2"] > 0.95 and row["top1"] == 1 for row in found[:HELD])
    assert all(abs(row["r2"]) < 0.01 and row["top1"] < 0.1 for row in found[HELD:])
    assert last_remembered(found) == HELD - 1


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
    assert last_remembered(rows) == 1
    assert last_remembered(rows[2:]) is None


class LastTokens(nn.Module):
    """A block whose contexts are the last `count` embeddings."""

    def __init__(self, count, size):
        super().__init__()
        self.width = count * size

    def forward(self, contexts, inputs):
        return torch.cat([inputs, contexts], dim=1)[:, : self.width]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_block_that_stores_the_last_tokens_has_their_number_as_its_span(count):
    ids = torch.randint(0, 40, (3000,), generator=torch.Generator().manual_seed(1))
    table = measured_span(LastTokens(count, 12), ids, embeddings(), most=8, context_dim=12 * count)
    assert (table.attrs["span"], table.attrs["span_error"]) == (count - 1, 0)
    assert (table.r2[:count] > 0.99).all()
    assert (table.recovered[:count] == 1).all()
    assert (table.recovered[count:] < 0.1).all()


def test_the_span_of_a_run_stands_beside_that_before_phase_1(trained):
    table = trained.memory_span("val", most=6)
    assert [*table] == ["r2", "recovered", "untrained_r2", "untrained_recovered"]
    assert [*table.index] == [*range(7)]
    assert not pd.isna(table.attrs["span_error"])
    assert {*table.attrs} == {"span", "span_error", "untrained_span", "untrained_span_error"}
    assert len(trained.memory_span("train", most=3)) == 4
    with pytest.raises(
        UserError, match=r"^most is 100000; allowed here: 0 to \d+, since a part of the text has"
    ):
        trained.memory_span("val", most=100_000)
