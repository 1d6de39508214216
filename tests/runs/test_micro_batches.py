"""Dropout in micro-batches and shards: that of the whole batch where it has a row for each position."""

import pytest
import torch
import torch.nn.functional as F
from conftest import write_conversations
from ctxkv_lib.runs.micro_batches import RowsOfDropout

from ctxkv_lib.method.caches import Batch
from ctxkv_lib.runs.run_folder import RunFolder
from ctxkv_lib.runs.testing import test_scores as scores_of
from ctxkv_lib.runs.testing import test_stream as stream_of
from ctxkv_lib.runs.testing import trained_model
from ctxkv_lib.runs.trained import evaluate_texts


def dropped(values):
    torch.manual_seed(0)
    return F.dropout(values, 0.5, training=True)


def test_dropout_of_a_row_for_each_position_is_that_of_the_whole_batch():
    with RowsOfDropout(6, slice(2, 5)):
        found = dropped(torch.ones(3, 4))
    assert torch.equal(found, dropped(torch.ones(6, 4))[2:5])


@pytest.mark.parametrize("shape", [(12, 4), (4, 3, 2)])  # slots flattened into rows, or in front of them
def test_other_dropout_is_drawn_as_ever(shape):
    with RowsOfDropout(6, slice(2, 5)):
        found = dropped(torch.ones(shape))
    assert torch.equal(found, dropped(torch.ones(shape)))


def test_trained_models_are_scored_in_micro_batches_when_memory_is_full(finished_run, tmp_path, monkeypatch):
    config = finished_run.config
    stream, model = stream_of(config), trained_model(config, RunFolder(finished_run.path))
    write_conversations(tmp_path / "other.jsonl", 3)
    whole = scores_of(config, model, stream), evaluate_texts(finished_run, tmp_path / "other.jsonl")
    original, sizes = Batch.scores, []

    def limited(batch, model):
        sizes.append(len(batch))
        if len(batch) > sizes[0] / 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(batch, model)

    monkeypatch.setattr(Batch, "scores", limited)
    found = scores_of(config, model, stream)
    for one, other in zip(found, whole[0], strict=True):
        torch.testing.assert_close(one, other)
    sizes.clear()
    scores = evaluate_texts(finished_run, tmp_path / "other.jsonl")
    assert scores["ppl"] == pytest.approx(whole[1]["ppl"])
    assert len(sizes) > 3
