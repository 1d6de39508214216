"""Tests of what Phase 1 computes: parts of long streams, samples for training, and dtypes of contexts."""

import torch
from torch.nn.utils import parameters_to_vector

from ctxkv_lib.experiments import prepare
from ctxkv_lib.method.config import Phase1Config
from ctxkv_lib.runs import contexts
from ctxkv_lib.runs.build import untrained_model
from ctxkv_lib.runs.contexts import phase1_ids


def test_untrained_weights_depend_on_the_seed(tiny_config):
    first, same, other = (
        parameters_to_vector(
            untrained_model(tiny_config.replace({"runtime.seed": seed}), 9, False).parameters()
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_each_part_of_a_long_stream_begins_where_the_one_before_ended(
    tiny_config, trained, own_store, tmp_path, monkeypatch
):
    monkeypatch.setattr(contexts, "SCAN_TOKENS", 50)
    prepared = prepare(tiny_config, tmp_path / "run")
    for split, stream in trained.streams.items():
        torch.testing.assert_close(prepared.streams[split].contexts, stream.contexts, atol=1e-2, rtol=0)


def test_phase_1_trains_on_even_samples_of_a_long_text():
    def starts(**settings):
        config = Phase1Config(batch_size=20, context_method="exact", **settings)
        ids = phase1_ids(torch.arange(1001), config)
        assert torch.equal(
            phase1_ids(torch.arange(1001), config, ahead=1), ids + 1
        )  # has the last token, too
        rows = ids.split(20)
        assert all((row.diff() == 1).all() for row in rows)
        return [int(row[0]) for row in rows], len(ids)

    assert starts(max_tokens=100) == ([0, 245, 490, 735, 980], 100)  # reaches the last of 1,000 positions
    assert starts(max_tokens=10) == ([0], 10)
    assert starts(max_tokens=1000) == ([*range(0, 1000, 20)], 1000)


def test_contexts_are_cached_in_the_precision_of_training_but_for_validation(tiny_config, tmp_path):
    streams = prepare(tiny_config.replace({"runtime.precision": "bf16"}), tmp_path / "run").streams
    assert {split: stream.contexts.dtype for split, stream in streams.items()} == {
        "train": torch.bfloat16,
        "val": torch.float32,
    }
