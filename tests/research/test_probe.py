"""The probe of a run: the blocks it compares, and the distances."""

import math

import pytest
import torch
from conftest import tiny_model

from ctxkv_lib.research import probe as module
from ctxkv_lib.research.probe import distances, probe, untrained_block
from ctxkv_lib.runs.run_folder import RunFolder


def test_a_run_is_probed_beside_untrained_blocks_and_halfway_through_what_is_read(trained, monkeypatch):
    found = probe(trained.run.config, RunFolder(trained.run.path), trained.model)
    assert list(found["fresh"]) == ["0.1", "0.01"]
    for block in (found, *found["fresh"].values()):
        assert [row["distance"] for row in block["recall"]] == distances(3, 12)
        assert 0 <= block["coverage"] <= 1
    # Distances end halfway through the tokens that are read, which here are all one interval.
    monkeypatch.setattr(module, "ROWS", {"train": 40, "val": 12})
    config = trained.run.config.replace({"model.interval": 12, "model.max_contexts": 1})
    found = probe(config, RunFolder(trained.run.path), trained.model)
    assert [row["distance"] for row in found["recall"]] == [*range(7)]
    assert math.isfinite(found["mean_recall"])


def test_distances_reach_through_the_window():
    assert distances(20, 640)[:21] == list(range(21))
    assert distances(20, 640)[21:] == [30, 45, 67, 100, 150, 225, 337, 505]
    assert distances(3, 12) == [0, 1, 2, 3, 4, 6, 9]
    assert distances(1, 64) == [0, 1, 2, 3, 4, 6, 9, 13, 19, 28, 42, 63]
    assert distances(1, 1) == [0]


@torch.no_grad()
def test_an_untrained_block_has_the_spread_asked_for_and_leaves_the_generator_alone():
    shape = tiny_model().config
    before = torch.get_rng_state()
    wide, narrow = (untrained_block(shape, std, seed=1) for std in (0.1, 0.01))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(narrow.linear.weight, wide.linear.weight / 10)
    assert wide.linear.weight.std().item() == pytest.approx(0.1, rel=0.1)
