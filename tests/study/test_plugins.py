"""Plug-ins of the study: each trains, keeps to its size, and does not read ahead."""

from types import SimpleNamespace

import plugins
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctxkv_lib as ctxkv
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.model import Parts
from ctxkv_lib.runs.rows import as_read

CONFIG = ctxkv.ModelConfig(
    hidden_size=24, context_dim=16, num_heads=4, intermediate_size=64, interval=3, max_contexts=4
)
PHASE1 = SimpleNamespace(clip_norm=1.0, centroid_weight=0.1)  # what a block's training reads of its settings
MIXERS = (plugins.NoContext, plugins.CausalAttention, plugins.GRU)


def falls(module, loss):
    """Whether ten steps lower the loss, and reach every parameter."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    first = loss().item()
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        assert all(weight.grad is not None for weight in module.parameters())
        optimizer.step()
    return loss().item() < first


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", MIXERS)
def test_a_mixer_trains_and_does_not_read_ahead(kind):
    mixer, embeddings = kind(CONFIG, kind.Settings()), torch.randn(2, 20, 24)
    target = torch.randn(2, 15, 24)
    assert falls(mixer, lambda: F.mse_loss(mixer(embeddings, 5), target))
    mixer.eval()
    changed = embeddings.clone()
    changed[:, 12:] += 1
    before, after = mixer(embeddings, 5), mixer(changed, 5)
    assert before.shape == target.shape
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_mixers_have_the_size_of_attention_to_contexts():
    config = ctxkv.ModelConfig()
    with torch.device("meta"):
        own = plugins.size_of(plugins.OtherSlots(config, plugins.OtherSlots.Settings()))
        for kind in MIXERS:
            assert plugins.size_of(kind(config, kind.Settings())) == pytest.approx(own, rel=1e-3)


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
    model = ctxkv.ContextKV(
        CONFIG, 30, parts=Parts(attention=lambda c: plugins.Chunked(c, plugins.Chunked.Settings()))
    )
    stream = StreamCache(torch.arange(301), torch.zeros(301, 16))
    order = as_read(model, stream, trained=True).epoch_order(0, 1)
    assert sorted(order.tolist()) == [*range(300)]
    assert (order.diff() != 1).sum() <= 5  # between chunks of 64


def test_attention_with_the_options_of_the_recipe_is_that_of_the_recipe():
    base = plugins.SlotAttention
    own, other = base(CONFIG, base.Settings()), plugins.OtherSlots(CONFIG, plugins.OtherSlots.Settings())
    other.load_state_dict(own.state_dict())
    args = torch.randn(8, 24), torch.randn(8, 4, 16), torch.ones(8, 4, dtype=torch.bool)
    torch.testing.assert_close(own.eval()(*args), other.eval()(*args))
    assert own.slot_offsets(CONFIG) == other.slot_offsets(CONFIG)
    with pytest.raises(ValueError, match=r"attention\.slots is 'far'; allowed: "):
        plugins.OtherSlots.Settings(slots="far")


def test_a_gated_block_is_the_cell_of_a_gru_and_a_token_block_holds_the_token():
    block, cell = plugins.GatedBlock(8, 12), nn.GRUCell(12, 8)
    cell.weight_ih, cell.bias_ih = block.read.weight, block.read.bias
    cell.weight_hh, cell.bias_hh = block.carry.weight, block.carry.bias
    contexts, inputs = torch.randn(5, 8), torch.randn(5, 12)
    torch.testing.assert_close(block(contexts, block.project_inputs(inputs)), cell(inputs, contexts))
    assert plugins.TokenBlock(12, 12)(contexts, inputs) is inputs
    with pytest.raises(ValueError, match="allowed with TokenBlock: 12"):
        plugins.TokenBlock(8, 12)


def contexts_of(block, embeddings):
    """Read a stream token by token from zeros."""
    state, made = torch.zeros(1, block.context_dim), []
    for token in embeddings:
        state = block(state, block.project_inputs(token[None]))
        made.append(state[0])
    return torch.stack(made).detach()


def decoded(contexts, wanted):
    """R² of a linear fit."""
    design = F.pad(contexts, (0, 1), value=1)
    errors = wanted - design @ torch.linalg.lstsq(design, wanted).solution
    return 1 - (errors.var() / wanted.var()).item()


@pytest.mark.parametrize(("kind", "size"), [(plugins.PredictiveBlock, 12), (plugins.AutoencodingBlock, 48)])
def test_a_block_is_trained_to_hold_what_its_objective_needs(kind, size):
    """In this stream the next token is mostly the one before the last; both need that."""
    draw = torch.randint(0, 6, (2000,)).tolist()
    tokens = draw[:2]
    for place in range(2, 2000):
        tokens.append(tokens[place - 2] if place % 3 else draw[place])
    stream, embeddings = torch.tensor(tokens), torch.randn(6, 16)
    block = kind(size, 16, kind.Settings(epochs=15, learning_rate=0.02))
    twin = kind(size, 16, block.settings)
    twin.load_state_dict(block.state_dict())
    before = decoded(contexts_of(block, embeddings[stream])[1:], embeddings[stream[:-1]])
    block.init_weights(embeddings, stream, PHASE1)
    twin.init_weights(embeddings, stream, PHASE1)
    torch.testing.assert_close(block.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert decoded(contexts_of(block, embeddings[stream])[1:], embeddings[stream[:-1]]) > before + 0.05
