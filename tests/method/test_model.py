"""The layers equal their definitions, and users may write their own layers in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, NearestTwo, cloned, tiny_ids, tiny_method, tiny_stream

from ctxkv_lib.method import reference
from ctxkv_lib.method.streams import Stream
from ctxkv_lib.runs.build import parameter_counts


def double_stream(count):
    stream = tiny_stream(count)
    return Stream(stream.ids, stream.contexts.double())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kv_method", ["fixed", "variable"])
def test_logits_and_gradients_equal_the_reference(kv_method, dropout):
    model = tiny_method(kv_method=kv_method, attention_dropout=dropout).double().train()
    cache, positions = double_stream(41), torch.tensor([0, 1, 2, 3, 9, 10, 40])
    direction = torch.randn(len(positions), TINY["vocab_size"], dtype=torch.float64)
    p = cloned(model)
    reference.trainable(p, ("attention.", "feed_forward."))

    torch.manual_seed(3)
    found = model.logits(model.read(model.batch(cache, positions))[0], cache.ids[positions])
    (found * direction).sum().backward()
    torch.manual_seed(3)
    ids, contexts = cache.ids.long(), cache.contexts[1:]
    expected = reference.phase2_logits(p, p["wte.weight"], ids, contexts, positions, model.config, dropout)
    (expected * direction).sum().backward()

    torch.testing.assert_close(found, expected)
    for name, weight in model.trained_weights().items():
        torch.testing.assert_close(weight.grad, p[name.removeprefix("layer.")].grad, msg=name)
    assert {name for name, tensor in p.items() if tensor.grad is not None} == {
        name.removeprefix("layer.") for name in model.trained_weights()
    }


def test_a_users_attention_chooses_its_slots_and_is_trained_in_phase_2():
    model, cache = tiny_method(layer=NearestTwo).double(), double_stream(9)
    assert parameter_counts(model)["trainable_phase2"] == 24 * 16 + 24
    hidden, weights = model.read(model.batch(cache, torch.tensor([0, 5])))
    assert weights is None
    seen = torch.stack([cache.contexts[1] / 2, (cache.contexts[6] + cache.contexts[5]) / 2])
    torch.testing.assert_close(hidden, model.embed(cache.ids[[0, 5]]) + model.layer.out(seen))


def test_log_frequencies_and_the_bias_of_the_current_token_are_in_logits_and_losses():
    model = tiny_method(layer=NearestTwo, has_unigram=True)
    bias, read, targets = torch.randn(TINY["vocab_size"]), tiny_ids(6), tiny_ids(6, seed=1)
    model.load_table(model.wte.weight.detach().clone(), bias)
    hidden = torch.randn(6, TINY["hidden_size"])
    expected = hidden @ model.wte.weight.T + bias
    expected -= 2.5 * F.one_hot(read, TINY["vocab_size"])
    torch.testing.assert_close(model.logits(hidden, read), expected)
    losses, _ = model.losses(hidden, read, targets)
    torch.testing.assert_close(losses, F.cross_entropy(expected, targets, reduction="none"))
