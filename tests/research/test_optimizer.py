import math

import pytest
import torch
from torch import nn

from ctxkv_lib.method.config import ModelConfig, Phase2Config
from ctxkv_lib.research.mixers import EndToEnd
from ctxkv_lib.research.optimizer import ScheduledAdamW, lr_lambda

Settings = ScheduledAdamW.Settings


def factors(steps, **settings):
    return [lr_lambda(step, steps, Settings(**settings)) for step in range(steps)]


COSINE = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0] * 8),
        ({"warmup": 0.5}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"schedule": "cosine"}, COSINE),
        ({"schedule": "cosine", "warmup": 0.25}, [COSINE[0] / 2, *COSINE[1:]]),
    ],
)
def test_the_rate_is_constant_or_falls_as_a_cosine_and_rises_before(settings, expected):
    assert factors(8, **settings) == pytest.approx(expected)


def stepper(weights, config=None, positions=100, **settings):
    return ScheduledAdamW(weights, config or Phase2Config(), positions, Settings(**settings))


def test_each_step_takes_its_rate_of_the_steps_of_all_epochs():
    """2 epochs of 3 batches, the last one of which is short."""
    weight = nn.Parameter(torch.zeros(()))
    config = Phase2Config(max_epochs=2, batch_size=40, learning_rate=0.1, weight_decay=0.0)
    optimizer = stepper({"w": weight}, config, schedule="cosine", warmup=0.5)
    moved = []
    for number in range(6):
        before = weight.item()
        weight.grad = torch.ones(())  # Adam steps by the rate where gradients stay the same
        optimizer.schedule(number)
        optimizer.step()
        moved.append(before - weight.item())
    expected = [0.1 * factor for factor in factors(6, schedule="cosine", warmup=0.5)]
    assert moved == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("tokens", "decay"), [(500, 4), (1000, 2), (4000, 0.5)])
def test_streams_of_any_length_decay_as_much_an_epoch(tokens, decay):
    weights, config = {"w": nn.Parameter(torch.zeros(2, 2))}, Phase2Config(weight_decay=2)
    for decay_tokens, expected in ((1000, decay), (0, 2)):
        groups = stepper(weights, config, tokens, decay_tokens=decay_tokens).optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [expected, 0]


@pytest.mark.parametrize("decayed", ["all", "matrices"])
def test_only_matrices_decay_where_that_is_asked_for(decayed):
    """Without gradients all that a step does to weights is to let them decay."""
    config = ModelConfig(hidden_size=12, context_dim=8, num_heads=2, intermediate_size=20, max_contexts=3)
    layer = EndToEnd(config, EndToEnd.Settings(slot_bias="learned"))
    model = nn.ModuleDict({"weighted": layer, "gru": nn.GRU(4, 4)})
    trained = dict(model.named_parameters())
    for weight in trained.values():
        weight.data.fill_(1.0)
        weight.grad = torch.zeros_like(weight)
    stepper(trained, Phase2Config(learning_rate=0.5, weight_decay=0.2), decayed=decayed).step()
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    matrices = {*linear, "gru.weight_ih_l0", "gru.weight_hh_l0"} - {"weighted.context_block.linear.weight"}
    for name, weight in trained.items():
        expected = 0.9 if decayed == "all" or name in matrices else 1.0
        torch.testing.assert_close(weight, torch.full_like(weight, expected), msg=name)


def test_an_average_keeps_its_share_at_every_step():
    weight = nn.Parameter(torch.zeros(3))
    optimizer, expected = stepper({"w": weight}, averaging=0.6), torch.zeros(3)
    for step in range(1, 12):
        weight.grad = torch.randn(3)
        optimizer.schedule(step - 1)
        optimizer.step()
        kept = min(0.6, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weight.detach()
    torch.testing.assert_close(optimizer.averages["w"], expected)
    own = weight.detach().clone()
    with optimizer.averaged():
        assert torch.equal(weight, optimizer.averages["w"])
    assert torch.equal(weight, own)
