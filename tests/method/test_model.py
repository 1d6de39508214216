"""The layers against their definitions, and what a user's own block or attention may be."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, NearestTwo, cloned, tiny_ids, tiny_method, tiny_stream

from ctxkv_lib.method import losses, reference
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.config import Phase1Config
from ctxkv_lib.method.model import Parts
from ctxkv_lib.runs.model import parameter_counts


def test_initial_weights():
    model = tiny_method(context_dim=64, hidden_size=96)
    linear = model.context_block.linear
    assert linear.weight.std().item() == pytest.approx(0.1, rel=0.03)
    assert linear.bias.std().item() == pytest.approx(0.01, rel=0.3)
    assert model.attention.q.weight.abs().max() <= 96**-0.5  # as torch draws those of a Linear
    model.context_block.init_weights(model.wte.weight, tiny_ids(9), Phase1Config(weight_std=0.02))
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)


def double_stream(count):
    stream = tiny_stream(count)
    return StreamCache(stream.ids, stream.contexts.double())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kv_method", ["fixed", "variable"])
def test_logits_and_gradients_equal_the_reference(kv_method, dropout):
    model = tiny_method(kv_method=kv_method, attention_dropout=dropout).double().train()
    cache, positions = double_stream(41), torch.tensor([0, 1, 2, 3, 9, 10, 40])
    direction = torch.randn(len(positions), TINY["vocab_size"], dtype=torch.float64)
    p = cloned(model)
    reference.trainable(p, ("attention.", "feed_forward."))

    torch.manual_seed(3)
    found = model.logits(cache.attend(model, positions)[0], cache.ids[positions])
    (found * direction).sum().backward()
    torch.manual_seed(3)
    ids, contexts = cache.ids.long(), cache.contexts[1:]
    expected = reference.phase2_logits(p, p["wte.weight"], ids, contexts, positions, model.config, dropout)
    (expected * direction).sum().backward()

    torch.testing.assert_close(found, expected)
    for name, weight in model.trained_weights().items():
        torch.testing.assert_close(weight.grad, p[name].grad, msg=name)
    assert {name for name, tensor in p.items() if tensor.grad is not None} == {*model.trained_weights()}


def test_a_users_attention_says_its_slots_and_is_what_phase_2_trains():
    model, cache = tiny_method(Parts(attention=NearestTwo)).double(), double_stream(9)
    assert parameter_counts(model)["trainable_phase2"] == 24 * 16 + 24
    hidden, weights = cache.attend(model, torch.tensor([0, 5]))
    assert weights is None
    seen = torch.stack([cache.contexts[1] / 2, (cache.contexts[6] + cache.contexts[5]) / 2])
    torch.testing.assert_close(hidden, model.embed(cache.ids[[0, 5]]) + model.attention.out(seen))


def test_log_frequencies_and_the_bias_of_the_current_token_are_in_logits_and_losses():
    model = tiny_method(Parts(attention=NearestTwo), has_unigram=True)
    bias, read, targets = torch.randn(TINY["vocab_size"]), tiny_ids(6), tiny_ids(6, seed=1)
    model.load_table(model.wte.weight.detach().clone(), bias)
    hidden = torch.randn(6, TINY["hidden_size"])
    expected = hidden @ model.wte.weight.T + bias
    expected -= 2.5 * F.one_hot(read, TINY["vocab_size"])
    torch.testing.assert_close(model.logits(hidden, read), expected)
    losses, _ = model.losses(hidden, read, targets)
    torch.testing.assert_close(losses, F.cross_entropy(expected, targets, reduction="none"))


def test_losses_of_a_model_in_half_precision_are_summed_in_fp32(monkeypatch):
    monkeypatch.setattr(losses, "VOCABULARY_CHUNK", 4)
    model, read = tiny_method().bfloat16(), tiny_ids(200)
    hidden = torch.randn(200, TINY["hidden_size"]).bfloat16()
    expected = F.cross_entropy(model.logits(hidden, read).double(), read, reduction="none")
    found, _ = model.losses(hidden, read, read)
    assert found.dtype == torch.float32
    assert (found - expected).mean().abs() < 1e-3
