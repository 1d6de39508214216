import pytest
import torch
from conftest import tiny_model

from ctxkv_lib.data.counts import principal_components
from ctxkv_lib.method import model as layers
from ctxkv_lib.method.contexts import exact_contexts
from ctxkv_lib.method.windows import window_rows


def test_contexts_begin_as_the_token_and_running_means_of_tokens():
    """Half of the units have the token whole, and a sixth each a mean of the 4, 9 and 20 tokens before."""
    block = tiny_model(context_dim=32, hidden_size=48).context_block
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.randn(16, 48, generator=draw) + torch.randn(48, generator=draw)
    tokens = torch.randint(0, 16, (4000,), generator=draw)
    block.hold_means(*principal_components(embeddings, tokens), 20.0)
    contexts, _ = exact_contexts(block, block.project_tokens(embeddings), tokens, 1e-5)
    contexts = contexts[101:].double()
    now = embeddings[tokens[100:]].double()
    assert torch.allclose(contexts.mean(dim=0), torch.zeros(32).double(), atol=0.1)
    whole = torch.linalg.lstsq(contexts[:, :16], now - now.mean(dim=0)).solution
    assert (contexts[:, :16] @ whole - now + now.mean(dim=0)).var() < 1e-3 * now.var()
    for units, reach in zip((slice(16, 21), slice(21, 26), slice(26, 31)), (4, 80**0.5, 20), strict=True):
        held = contexts[:, units]
        assert held.std(dim=0).mean().item() == pytest.approx(layers.MEAN_STD, rel=0.2)
        kept = (held[1:] * held[:-1]).sum() / held.square().sum()
        assert kept.item() == pytest.approx(1 - 1 / reach, abs=0.05)


def test_principal_components_weigh_tokens_as_often_as_they_occur():
    embeddings = torch.tensor([[1.0, 0.0, 5.0], [-1.0, 0.0, 5.0], [0.0, 4.0, 5.0]])
    mean, axes, deviations = principal_components(embeddings, torch.tensor([0, 1, 0, 1, 0, 1, 2, 0, 1, 0, 1]))
    assert torch.allclose(mean, torch.tensor([0.0, 4 / 11, 5.0]), atol=1e-6)
    assert torch.allclose(axes, torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]), atol=1e-6)
    wanted = [4 * (10 / 121) ** 0.5, (10 / 11) ** 0.5]
    assert torch.allclose(deviations, torch.tensor([*wanted, wanted[0] / 1000]), atol=1e-5)


def test_a_stream_of_one_token_has_contexts_too():
    block, embeddings = tiny_model(context_dim=32, hidden_size=48).context_block, torch.randn(1, 48)
    tokens = torch.zeros(50, dtype=torch.int64)
    block.hold_means(*principal_components(embeddings, tokens), 20.0)
    contexts, _ = exact_contexts(block, block.project_tokens(embeddings), tokens, 1e-5)
    assert contexts.abs().max() < 0.1


def held_tokens(stream):
    """A model whose contexts hold the last 6 tokens, embeddings of 100 tokens, and the stream's contexts."""
    shapes = {"hidden_size": 200, "context_dim": 256, "num_heads": 5, "interval": 5, "max_contexts": 6}
    model = tiny_model(**shapes, sink="learned").eval()
    embeddings = torch.nn.functional.layer_norm(torch.randn(100, 200), (200,))
    mean, _, deviations = principal_components(embeddings, stream)
    model.context_block.hold_tokens(mean, deviations, 6)
    token_half = model.context_block.project_tokens(embeddings)
    return model, embeddings, exact_contexts(model.context_block, token_half, stream, 1e-5)[0]


def test_contexts_begin_as_the_last_tokens_one_by_one():
    torch.manual_seed(0)
    stream = torch.randint(0, 100, (2000,))
    model, _, contexts = held_tokens(stream)
    size = model.context_block.place_size(6)
    assert size == 42
    held = contexts[101:, :252].unflatten(1, (6, size))
    assert held.std().item() == pytest.approx(1, rel=0.1)
    for place in range(1, 6):
        earlier = held[:-place, 0] - held[place:, place]
        assert earlier.square().mean() < 0.05


def test_heads_begin_as_look_ups_of_what_followed():
    """A token that comes again is found wherever it stood in the window, by the head of its place alone."""
    torch.manual_seed(0)
    stream = torch.randperm(100)[:80]
    for back in range(1, 30):
        again = torch.cat([stream, stream[80 - back : 81 - back]])
        model, embeddings, contexts = held_tokens(again)
        model.attention.look_up(model.context_block, 6)
        position = torch.tensor([80])
        window = contexts[window_rows(position, model.config)]
        _, attended, weights = model.attention(embeddings[again[position]], window, None)
        slot, place = divmod(back, 5)
        if place == 0:  # it lies on a slot, and what followed it in the one before
            slot, place = slot - 1, 5
        assert weights[0].flatten().argmax() == (place - 1) * 6 + slot
        assert (embeddings @ attended[0]).argmax() == again[81 - back]


def test_a_token_that_is_new_is_looked_up_almost_nowhere():
    torch.manual_seed(0)
    stream = torch.randperm(100)
    model, embeddings, contexts = held_tokens(stream)
    model.attention.look_up(model.context_block, 6)
    positions = torch.arange(30, 100)
    window = contexts[window_rows(positions, model.config)]
    _, _, weights = model.attention(embeddings[stream[positions]], window, None)
    assert weights.sum(dim=2).median() < 0.1  # of a head
