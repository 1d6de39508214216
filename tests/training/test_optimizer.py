import math

import pytest
import torch
from conftest import tiny_model

from ctxkv_lib.method.optimizer import Average, make_optimizer, rate_factor, weight_decay
from ctxkv_lib.runs.config import Phase2Config


def factors(steps, **settings):
    config = Phase2Config(**settings)
    return [rate_factor(step, steps, config) for step in range(steps)]


def test_the_published_rate_is_constant():
    assert factors(7) == [1.0] * 7


def test_a_warm_up_rises_to_the_whole_rate():
    assert factors(10, warmup=0.4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_a_cosine_falls_towards_zero():
    found = factors(8, schedule="cosine")
    assert found == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert factors(8, schedule="cosine", warmup=0.25) == pytest.approx([found[0] / 2, *found[1:]])


def test_streams_of_any_length_decay_as_much_an_epoch():
    config = Phase2Config(weight_decay=2, decay_tokens=1000)
    assert [weight_decay(config, tokens) for tokens in (500, 1000, 4000)] == [4, 2, 0.5]
    assert weight_decay(Phase2Config(weight_decay=2), 4000) == 2


@pytest.mark.parametrize("decayed", ["all", "matrices"])
def test_only_matrices_decay_where_that_is_asked_for(decayed):
    """Without gradients all that a step does to weights is to let them decay."""
    model = tiny_model(slot_bias="learned")
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for weight in trained.values():
        weight.data.fill_(1.0)
        weight.grad = torch.zeros_like(weight)
    config = Phase2Config(learning_rate=0.5, weight_decay=0.2, decayed=decayed)
    make_optimizer(model, config, 1000).step()
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    for name, weight in trained.items():
        expected = 0.9 if decayed == "all" or name in linear else 1.0
        torch.testing.assert_close(weight, torch.full_like(weight, expected), msg=name)


def test_an_average_keeps_its_share_at_every_step():
    weight = torch.nn.Parameter(torch.zeros(3))
    average, expected = Average({"w": weight}, 0.6), torch.zeros(3)
    for step in range(1, 12):
        weight.data = torch.randn(3)
        average.take_in(step)
        kept = min(0.6, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weight.detach()
    torch.testing.assert_close(average.values["w"], expected)
    own = weight.detach().clone()
    with average.in_place():
        assert torch.equal(weight, average.values["w"])
    assert torch.equal(weight, own)
