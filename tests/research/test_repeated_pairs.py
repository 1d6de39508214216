"""Test perplexity where a pair of tokens occurs again."""

from itertools import pairwise

import pytest
import torch
from conftest import tiny_ids

from ctxkv_lib.experiments import run
from ctxkv_lib.research import repeated_pairs as module
from ctxkv_lib.research.measure import measure
from ctxkv_lib.runs.testing import test_scores as scores_of
from ctxkv_lib.runs.testing import test_stream as stream_of
from ctxkv_lib.runs.testing import trained_model


@pytest.mark.parametrize("mixer", [False, True])
def test_it_is_the_test_perplexity_of_tokens_whose_pair_is_among_the_last_640(tiny_config, tmp_path, mixer):
    """A baseline without contexts has it, too."""
    plugins = {"mixer": "ctxkv_lib.research.mixers:NoContext"} if mixer else {}
    finished = measure(run(tiny_config, tmp_path / "run", **plugins), ["repeated_pairs"])
    stream = stream_of(finished.config)
    model = trained_model(finished.config, module.RunFolder(finished.path))
    losses, _ = scores_of(finished.config, model, stream)
    ids = stream.ids.tolist()
    came = list(pairwise(ids))
    again = torch.tensor([pair in came[max(0, i - 639) : i] for i, pair in enumerate(came)])
    found = finished.summary["repeated_pairs"]
    assert 0 < found["tokens"] == again.sum() < len(ids)
    assert found["ppl"] == pytest.approx(losses[again].mean().exp().item())


def test_repeated_pairs_are_those_seen_within_the_window():
    ids = tiny_ids(400) % 9
    since = module.since_last(module.pairs(ids))
    for window in (1, 5, 40):
        expected = [
            any((ids[j], ids[j + 1]) == (ids[i], ids[i + 1]) for j in range(max(0, i - window + 1), i))
            for i in range(len(ids) - 1)
        ]
        assert (since < window).tolist() == expected
