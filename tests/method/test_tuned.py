"""The parts of recipe `tuned`, in models built directly from them."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_method

from ctxkv_lib.method import tuned
from ctxkv_lib.method.config import ModelConfig, Phase1Config
from ctxkv_lib.method.contexts import exact_contexts
from ctxkv_lib.method.tuned import SlotLayer, StructuredBlock, geometric_offsets


def tiny_model(shapes=None, **layer):
    block = partial(StructuredBlock, settings=StructuredBlock.Settings())
    return tiny_method(block, partial(SlotLayer, settings=SlotLayer.Settings(**layer)), **(shapes or {}))


def test_a_block_encodes_the_token_and_running_means_of_tokens():
    """Half of the units encode the token. Three groups of units encode means of about 4, 9 and 20 tokens."""
    draw = torch.Generator().manual_seed(0)
    block = StructuredBlock(32, 48, StructuredBlock.Settings(longest_mean=20.0))
    embeddings = torch.randn(16, 48, generator=draw) + torch.randn(48, generator=draw)
    tokens = torch.randint(0, 16, (4100,), generator=draw)
    block.init_weights(embeddings, tokens, Phase1Config())
    contexts = exact_contexts(block, block.project_inputs(embeddings), tokens, torch.zeros(32), 1e-6)
    rows = contexts[101:].double()
    now = embeddings[tokens[100:]].double()
    assert torch.allclose(rows.mean(dim=0), torch.zeros(32).double(), atol=0.1)
    assert rows[:, :16].var(dim=0).mean().item() == pytest.approx(1, rel=0.1)
    whole = torch.linalg.lstsq(rows[:, :16], now - now.mean(dim=0)).solution
    assert (rows[:, :16] @ whole - now + now.mean(dim=0)).var() < 1e-3 * now.var()
    for units, length in zip((slice(16, 21), slice(21, 26), slice(26, 31)), (4, 80**0.5, 20), strict=True):
        mean = rows[:, units]
        assert mean.std(dim=0).mean().item() == pytest.approx(tuned.MEAN_STD, rel=0.2)
        kept = (mean[1:] * mean[:-1]).sum() / mean[1:].square().sum()
        assert kept.item() == pytest.approx(1 - 1 / length, abs=0.05)


def test_a_block_wider_than_an_embedding_is_refused():
    with pytest.raises(
        ValueError, match=r"context_dim is 25; allowed: at most model\.hidden_size \(24\) with"
    ):
        tiny_model({"context_dim": 25})


def plain_layer(layer, embeddings, window, mask):
    """Compute the layer by its definition: keys and values for every slot, and a softmax over slots."""
    attention, inner = layer.attention, layer.feed_forward
    heads = (attention.num_heads, attention.head_dim)
    x = layer.input_dropout(embeddings)
    q = attention.q(x).unflatten(-1, heads)
    k, v = attention.k(window).unflatten(-1, heads), attention.v(window).unflatten(-1, heads)
    scores = torch.einsum("nhd,nshd->nhs", q, k) / attention.head_dim**0.5
    scores = scores + attention.slot_bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    weights = scores.softmax(-1)
    mixed = torch.einsum("nhs,nshd->nhd", attention.dropout(weights), v)
    attended = layer.layer_dropout(attention.out(mixed.flatten(1)))
    hidden = attention.norm(x + attended)
    added = inner.norm(inner.dropout(inner.down(inner.dropout(F.gelu(inner.up(hidden))))))
    return attended + added


def positions_of(model, positions, dtype=torch.float32):
    """Return random embeddings, windows of random contexts, and which slots are present at `positions`."""
    rows = model.window.rows(torch.tensor(positions))
    contexts = torch.randn(42, TINY["context_dim"], dtype=dtype)
    contexts[0] = 0
    return torch.randn(len(positions), TINY["hidden_size"], dtype=dtype), contexts[rows], rows > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kv_method", ["fixed", "variable"])
def test_the_layer_equals_projected_keys_and_values(dropout, kv_method):
    """Values and gradients are equal, since both versions draw dropout in the same order."""
    shapes = {"kv_method": kv_method, "attention_dropout": dropout}
    model = tiny_model(shapes, input_dropout=dropout, layer_dropout=dropout).double().train()
    layer = model.layer
    layer.attention.slot_bias.data += torch.randn_like(layer.attention.slot_bias)
    embeddings, window, present = positions_of(model, [0, 1, 2, 3, 9, 10, 40], torch.float64)
    direction = torch.randn_like(embeddings)
    mask = present if kv_method == "variable" else None
    results = []
    for hidden_of in (
        lambda: layer(embeddings, window, present)[0],
        lambda: plain_layer(layer, embeddings, window, mask),
    ):
        torch.manual_seed(3)
        hidden = hidden_of()
        results.append([hidden, *torch.autograd.grad((hidden * direction).sum(), [*layer.parameters()])])
    torch.testing.assert_close(*results)


def test_heads_prefer_one_of_the_nearest_slots():
    layer = tiny_model({"num_heads": 8, "max_contexts": 32}).layer
    layer.attention.k.weight.data.zero_()  # only the bias of the slots counts
    embeddings, window = torch.randn(1, TINY["hidden_size"]), torch.randn(1, 32, TINY["context_dim"])
    _, weights = layer(embeddings, window, torch.ones(1, 32, dtype=torch.bool))
    for found, slot in zip(weights[0], [1, 1, 1, 2, 2, 3, 3, 4], strict=True):
        scores = 4.0 * F.one_hot(torch.tensor(slot), 32)
        torch.testing.assert_close(found, scores.softmax(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("interval", [1, 2, 20])
@pytest.mark.parametrize("max_contexts", [1, 2, 3, 32])
def test_geometric_slots_reach_as_far_back_as_uniform_slots(interval, max_contexts):
    offsets = geometric_offsets(ModelConfig(interval=interval, max_contexts=max_contexts))
    steps = [further - nearer for nearer, further in pairwise(offsets)]
    assert len(offsets) == max_contexts
    assert (offsets[0], offsets[-1]) == (0, interval * (max_contexts - 1))
    assert all(step >= 1 for step in steps)
    assert max_contexts < 3 or steps[0] == 1


def test_the_window_has_the_slots_of_the_attention():
    assert geometric_offsets(ModelConfig())[:16] == [*range(14), 16, 20]
    assert tiny_model().window.offsets == [0, 1, 3, 9]
