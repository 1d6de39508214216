import pytest
import torch
from conftest import tiny_model

from ctxkv_lib.data.counts import principal_components
from ctxkv_lib.model import layers
from ctxkv_lib.training.recurrence import exact_contexts


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
