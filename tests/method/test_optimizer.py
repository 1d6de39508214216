import math

import pytest
import torch
from torch import nn

from ctxkv_lib.method import optimizer
from ctxkv_lib.method.config import ModelConfig, Phase2Config
from ctxkv_lib.method.optimizer import EMA_DECAY, ScheduledAdamW
from ctxkv_lib.method.tuned import SlotLayer


def test_the_learning_rate_warms_up_and_falls_as_a_cosine_over_all_steps(monkeypatch):
    """There are 2 epochs of 3 batches; the last batch is shorter."""
    monkeypatch.setattr(optimizer, "WARMUP", 0.5)
    weight = nn.Parameter(torch.zeros(()))
    config = Phase2Config(max_epochs=2, batch_size=40, learning_rate=0.1, weight_decay=0.0)
    stepper, moved = ScheduledAdamW({"w": weight}, config, 100), []
    for number in range(6):
        before = weight.item()
        weight.grad = torch.ones(())  # with constant gradients, Adam steps by the learning rate
        stepper.schedule(number)
        stepper.step()
        moved.append(before - weight.item())
    cosine = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    risen = [1 / 3, 2 / 3, 1, 1, 1, 1]
    expected = [0.1 * part * share for part, share in zip(risen, cosine, strict=True)]
    assert moved == pytest.approx(expected, rel=1e-4)


def test_only_matrices_decay():
    """With zero gradients, a step changes weights only by their decay."""
    config = ModelConfig(hidden_size=12, context_dim=8, num_heads=2, intermediate_size=20, max_contexts=3)
    layer = SlotLayer(config, SlotLayer.Settings())
    model = nn.ModuleDict({"layer": layer, "gru": nn.GRU(4, 4)})
    trained = dict(model.named_parameters())
    for weight in trained.values():
        weight.data.fill_(1.0)
        weight.grad = torch.zeros_like(weight)
    ScheduledAdamW(trained, Phase2Config(learning_rate=0.5, weight_decay=0.2), 50_000).step()
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    for name, weight in trained.items():
        expected = 0.9 if name in {*linear, "gru.weight_ih_l0", "gru.weight_hh_l0"} else 1.0
        torch.testing.assert_close(weight, torch.full_like(weight, expected), msg=name)


def test_averaged_weights_follow_the_formula_at_every_step():
    weight = nn.Parameter(torch.zeros(3))
    stepper, expected = ScheduledAdamW({"w": weight}, Phase2Config(), 100), torch.zeros(3)
    for step in range(1, 12):
        weight.grad = torch.randn(3)
        stepper.schedule(step - 1)
        stepper.step()
        kept = min(EMA_DECAY, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weight.detach()
    torch.testing.assert_close(stepper.averages["w"], expected)
    own = weight.detach().clone()
    with stepper.averaged():
        assert torch.equal(weight, stepper.averages["w"])
    assert torch.equal(weight, own)
