"""Each baseline trains, has the size that it should have, and computes what its name says."""

import pytest
import torch
import torch.nn.functional as F
from tiny import falls
from torch import nn

from ctxkv_lib import ModelConfig, baselines
from ctxkv_lib.experiments import run
from ctxkv_lib.method.layer import AttentionLayer
from ctxkv_lib.report.export import export
from ctxkv_lib.runs.presets import build_config

CONFIG = ModelConfig(
    hidden_size=24, context_dim=16, num_heads=4, intermediate_size=64, interval=3, max_contexts=4
)
LAYERS = [baselines.CurrentToken, baselines.LastTokens, baselines.GRU, baselines.LSTM]
# Test perplexity of a tiny run with each part, from the classes that the study's results were made with.
# There is none for LSTM, which the study trains without this package.
KNOWN = {
    "CurrentToken": 59.1322,
    "LastTokens": 53.5195,
    "GRU": 65.2206,
    "GatedBlock": 48.6316,
    "Recall": 39986.5,
    "NextEmbedding": 39371.6,
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_has_as_many_weights_as_the_published_layer(kind):
    with torch.device("meta"):
        published = baselines.size_of(AttentionLayer(ModelConfig()))
        assert baselines.size_of(kind(ModelConfig(), kind.Settings())) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_trains(kind):
    """This test does not check whether the layer reads ahead, because every run checks this."""
    layer, embeddings, target = kind(CONFIG, kind.Settings()), torch.randn(2, 20, 24), torch.randn(2, 15, 24)
    assert falls(layer, lambda: F.mse_loss(layer(embeddings, 5), target))


def test_attention_reads_exactly_the_last_tokens():
    layer = baselines.LastTokens(CONFIG, baselines.LastTokens.Settings(history=3)).eval()
    embeddings = torch.randn(1, 9, 24)
    changed = [index for index in range(9) if not _is_same(layer, embeddings, index)]
    assert (layer.history, changed) == (2, [6, 7, 8])


def _is_same(layer, embeddings, index):
    other = embeddings.clone()
    other[:, index] += 1
    return torch.allclose(layer(embeddings, 8), layer(other, 8), atol=1e-6)


def test_a_gated_block_is_the_cell_of_a_gru():
    block, cell = baselines.GatedBlock(8, 12), nn.GRUCell(12, 8)
    cell.weight_ih, cell.bias_ih = block.read.weight, block.read.bias
    cell.weight_hh, cell.bias_hh = block.carry.weight, block.carry.bias
    contexts, inputs = torch.randn(5, 8), torch.randn(5, 12)
    torch.testing.assert_close(block(contexts, block.project_inputs(inputs)), cell(inputs, contexts))


def test_a_loss_of_phase_1_compares_contexts_with_the_tokens_that_its_name_says():
    embeddings = torch.randn(20, 12)
    recall, predict = baselines.Recall(8, 12), baselines.NextEmbedding(8, 12)
    contexts = torch.randn(20, 8)
    assert falls(recall, lambda: recall(contexts, embeddings))
    assert falls(predict, lambda: predict(contexts, embeddings))
    squares = [
        (recall.read[back](contexts[at]) - embeddings[at - back]).square().sum()
        for back in range(baselines.RECALLED)
        for at in range(back, 20)
    ]
    torch.testing.assert_close(recall(contexts, embeddings), sum(squares) / embeddings.numel())


@pytest.mark.parametrize("name", KNOWN)
def test_a_tiny_run_gives_the_study_s_numbers(name, tiny_settings, tmp_path):
    part = getattr(baselines, name)
    kind = "layer" if part in LAYERS else "block" if name == "GatedBlock" else "loss"
    settings = tiny_settings | {"runtime.precision": "fp32", "runtime.threads": 1}
    config = build_config("ci", "exact" if kind == "loss" else "tuned", 8, settings, **{kind: part})
    if name == "LastTokens":  # the study reads the whole window
        config = config.replace({"layer.history": config.model.context_window})
    done = run(config, tmp_path / "run")
    assert done.summary["test"]["ppl"] == pytest.approx(KNOWN[name], rel=2e-3)
    if kind == "block":
        assert (export(done) / "baselines.py").is_file()
