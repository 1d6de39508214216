"""Each plug-in of the study trains, and computes what its name says."""

import copy
from types import SimpleNamespace

import plugins
import pytest
import torch
import torch.nn.functional as F
from tiny import falls
from torch import nn

import ctxkv_lib as ctxkv
from ctxkv_lib.method.contexts import exact_contexts
from ctxkv_lib.method.phase2 import epoch_order
from ctxkv_lib.method.streams import Stream

CONFIG = ctxkv.ModelConfig(
    hidden_size=24, context_dim=16, num_heads=4, intermediate_size=64, interval=3, max_contexts=4
)
PHASE1 = SimpleNamespace(clip_norm=1.0, centroid_weight=0.1)  # the settings that training a block reads


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("slot_bias", ["nearest", "per_head", "learned", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_attention_with_other_options_trains(slot_bias, residual):
    settings = plugins.OtherSlots.Settings(slots="uniform", slot_bias=slot_bias, residual=residual)
    layer = plugins.OtherSlots(CONFIG, settings)
    assert layer.slot_offsets(CONFIG) == [0, 3, 6, 9]
    args = torch.randn(8, 24), torch.randn(8, 4, 16), torch.ones(8, 4, dtype=torch.bool)
    target = torch.randn(8, 24)
    assert falls(layer, lambda: F.mse_loss(layer(*args)[0], target))


def test_chunked_attention_is_trained_on_consecutive_positions():
    model = ctxkv.ContextKV(CONFIG, 30, layer=lambda c: plugins.Chunked(c, plugins.Chunked.Settings()))
    stream = Stream(torch.arange(301), torch.zeros(301, 16))
    order = epoch_order(len(stream), 0, 1, model.window.chunk)
    assert sorted(order.tolist()) == [*range(300)]
    assert (order.diff() != 1).sum() <= 5  # between chunks of 64


def test_attention_with_the_options_of_the_recipe_is_that_of_the_recipe():
    base = plugins.SlotLayer
    own, other = base(CONFIG, base.Settings()), plugins.OtherSlots(CONFIG, plugins.OtherSlots.Settings())
    other.load_state_dict(own.state_dict())
    args = torch.randn(8, 24), torch.randn(8, 4, 16), torch.ones(8, 4, dtype=torch.bool)
    torch.testing.assert_close(own.eval()(*args), other.eval()(*args))
    assert own.slot_offsets(CONFIG) == other.slot_offsets(CONFIG)


def test_the_context_of_a_token_block_is_the_token():
    contexts, inputs = torch.randn(5, 8), torch.randn(5, 12)
    assert plugins.TokenBlock(12, 12)(contexts, inputs) is inputs


@pytest.mark.parametrize("removed", [1.0, -1.0])
def test_a_moved_block_gives_the_published_contexts_moved_by_a_multiple_of_their_mean(removed):
    stream, embeddings = torch.randint(0, 6, (500,)), torch.randn(6, 16)
    phase1 = SimpleNamespace(weight_std=0.1, tolerance=1e-6)
    block = plugins.MovedBlock(12, 16, plugins.MovedBlock.Settings(removed))
    block.init_weights(embeddings, stream, phase1)

    def contexts(before):
        return exact_contexts(block, block.project_inputs(embeddings), stream, before, 1e-6)[1:]

    plain = contexts(torch.zeros(12))  # in training mode, nothing is moved
    block.eval()
    moved = contexts(block.shift)
    torch.testing.assert_close(moved, plain - removed * plain.mean(dim=0), atol=1e-4, rtol=0)
    assert removed != 1.0 or moved.mean(dim=0).norm() < 1e-4


@pytest.mark.parametrize("kind", [plugins.PredictiveBlock, plugins.AutoencodingBlock])
def test_a_block_with_an_objective_of_its_own_is_trained_to_the_same_weights_each_time(kind):
    stream, embeddings = torch.randint(0, 6, (500,)), torch.randn(6, 16)
    block = kind(12, 16, kind.Settings(epochs=2))
    made = [copy.deepcopy(block) for _ in range(2)]
    for each in made:
        each.init_weights(embeddings, stream, PHASE1)
    trained, again, before = (nn.utils.parameters_to_vector(each.parameters()) for each in (*made, block))
    assert torch.equal(trained, again)
    assert not torch.allclose(trained, before, atol=1e-3)


def test_decorrelation_is_lowest_for_uncorrelated_units_that_vary_enough():
    drawn = torch.randn(200, 8)
    apart = 1.1 * 200**0.5 * torch.linalg.qr(drawn - drawn.mean(dim=0))[0]
    mixed, small = apart @ torch.randn(8, 8), apart / 10
    assert plugins.decorrelation(apart) < 0.01
    assert min(plugins.decorrelation(mixed), plugins.decorrelation(small)) > 0.5
