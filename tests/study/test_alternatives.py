"""Tests of the study's ordinary models: gradients, windows, and a whole training run."""

import alternatives
import pytest
import torch
import torch.nn.functional as F
from small_models import GPT, LSTM, WEIGHTS, LanguageModel

from ctxkv_lib.baselines import size_of

COUNTS = torch.arange(30) % 3  # every third token does not occur


@pytest.fixture(params=[GPT, LSTM])
def model(request, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("small_models.WEIGHTS", 2_000_000)
    body = request.param(32, 1, 0.0)
    monkeypatch.setattr(body, "evaluation_length", 8, raising=False)
    return LanguageModel(body, torch.randn(30, 32), torch.randn(30), COUNTS)


@pytest.mark.parametrize("kind", [GPT, LSTM])
def test_models_train_as_many_weights_as_the_others(kind):
    with torch.device("meta"):
        assert size_of(kind(768, 3, 0.0)) == pytest.approx(WEIGHTS, rel=1e-3)


def test_gradients_are_those_of_the_mean_cross_entropy_over_tokens_that_occur(model):
    tokens = model.known[torch.randint(20, (2, 9))]
    model.set_gradients(tokens, None)
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    places = model.place[tokens]
    hidden, _ = model(F.embedding(places[:, :-1], model.table))
    logits = F.linear(hidden.flatten(0, 1), model.table, model.bias)
    F.cross_entropy(logits, places[:, 1:].flatten()).backward()
    for name, weight in model.named_parameters():
        assert (found[name] - weight.grad).norm() < 0.03 * weight.grad.norm() + 1e-6, name


def test_each_token_is_scored_once_from_what_its_window_read(model):
    ids = torch.randint(30, (26,))
    found = model.token_losses(ids)
    table, bias = model.whole_table, model.whole_bias
    for position in (0, 3, 4, 9, 24):
        start = max(0, position // 4 * 4 - 4)  # windows of 8 overlap by half
        hidden, _ = model(F.embedding(ids[start : position + 1], table)[None])
        expected = F.cross_entropy(F.linear(hidden[0, -1:], table, bias), ids[position + 1, None])
        assert found[position].item() == pytest.approx(expected.item(), abs=0.06)
    assert len(found) == 25


def test_steps_are_consecutive_rows_of_the_stream():
    torch.manual_seed(1)
    steps = alternatives.batches(torch.arange(101), 8, 2)
    assert steps.shape[1:] == (2, 9)
    assert (steps[1:, :, 0] == steps[:-1, :, -1]).all()  # rows continue in the next step
    assert steps[..., 1:].unique().numel() == steps[..., 1:].numel()


def test_a_model_is_trained_and_measured_by_conversation(monkeypatch):
    monkeypatch.setattr("small_models.WEIGHTS", 200_000)
    settings = {**alternatives.CHOSEN["LSTM, random embeddings"], "epochs": 1}
    cell = alternatives.train("LSTM, random embeddings", 2, 1, settings, "ci")
    assert cell["best_epoch"] == 1
    assert 1 < cell["val_ppl"] < 50_257
    assert cell["epoch_seconds"] > 0
    assert len(cell["test_conversations"]) == 2
