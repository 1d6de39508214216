"""Plug-ins of recipes `tuned` and `look_up`, in models built directly from them."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_method

from ctxkv_lib.method.config import ModelConfig, Phase1Config
from ctxkv_lib.method.model import ContextBlock, ContextKV, Parts
from ctxkv_lib.research import tuned
from ctxkv_lib.research.tuned import SlotAttention, StructuredBlock, geometric_offsets, principal_components
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.models import parameter_counts


def tiny_model(block=None, shapes=None, **attention):
    parts = Parts(
        partial(StructuredBlock, settings=StructuredBlock.Settings(**(block or {}))),
        partial(SlotAttention, settings=SlotAttention.Settings(**attention)),
    )
    return tiny_method(parts, **(shapes or {}))


def structured_block(context_dim, hidden_size, **settings):
    return StructuredBlock(context_dim, hidden_size, StructuredBlock.Settings(**settings))


@torch.no_grad()
def recurrence(block, embeddings, tokens):
    """Contexts `[streams, n + 1, context_dim]` of tokens `[streams, n]`, with the zero context in front."""
    contexts = [torch.zeros(len(tokens), block.context_dim)]
    for inputs in block.project_inputs(embeddings)[tokens].unbind(1):
        contexts.append(block(contexts[-1], inputs))
    return torch.stack(contexts, dim=1)


def test_a_block_encodes_the_token_and_running_means_of_tokens():
    """Half of the units have the token whole, and a sixth each a mean of the 4, 9 and 20 tokens before."""
    draw = torch.Generator().manual_seed(0)
    block = structured_block(32, 48, longest_mean=20.0)
    embeddings = torch.randn(16, 48, generator=draw) + torch.randn(48, generator=draw)
    tokens = torch.randint(0, 16, (20, 300), generator=draw)
    block.init_weights(embeddings, tokens.flatten(), Phase1Config())
    contexts = recurrence(block, embeddings, tokens)[:, 101:].double()
    rows, now = contexts.flatten(0, 1), embeddings[tokens[:, 100:].flatten()].double()
    assert torch.allclose(rows.mean(dim=0), torch.zeros(32).double(), atol=0.1)
    assert rows[:, :16].var(dim=0).mean().item() == pytest.approx(1, rel=0.1)
    whole = torch.linalg.lstsq(rows[:, :16], now - now.mean(dim=0)).solution
    assert (rows[:, :16] @ whole - now + now.mean(dim=0)).var() < 1e-3 * now.var()
    for units, length in zip((slice(16, 21), slice(21, 26), slice(26, 31)), (4, 80**0.5, 20), strict=True):
        mean = contexts[..., units]
        assert mean.flatten(0, 1).std(dim=0).mean().item() == pytest.approx(tuned.MEAN_STD, rel=0.2)
        kept = (mean[:, 1:] * mean[:, :-1]).sum() / mean[:, 1:].square().sum()
        assert kept.item() == pytest.approx(1 - 1 / length, abs=0.05)


def test_principal_components_weigh_tokens_as_often_as_they_occur():
    embeddings = torch.tensor([[1.0, 0.0, 5.0], [-1.0, 0.0, 5.0], [0.0, 4.0, 5.0]])
    mean, axes, deviations = principal_components(embeddings, torch.tensor([0, 1, 0, 1, 0, 1, 2, 0, 1, 0, 1]))
    assert torch.allclose(mean, torch.tensor([0.0, 4 / 11, 5.0]), atol=1e-6)
    assert torch.allclose(axes, torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]), atol=1e-6)
    wanted = [4 * (10 / 121) ** 0.5, (10 / 11) ** 0.5]
    assert torch.allclose(deviations, torch.tensor([*wanted, wanted[0] / 1000]), atol=1e-5)
    _, axes, _ = principal_components(torch.randn(40, 9), torch.arange(40))
    assert all(axis[axis.abs().argmax()] > 0 for axis in axes)


def test_a_stream_of_one_token_has_contexts_too():
    block, embeddings = structured_block(32, 48, longest_mean=20.0), torch.randn(1, 48)
    tokens = torch.zeros(50, dtype=torch.int64)
    block.init_weights(embeddings, tokens, Phase1Config())
    assert recurrence(block, embeddings, tokens[None]).abs().max() < 0.1


def test_without_settings_a_block_is_the_published_one():
    embeddings, tokens = torch.randn(5, 24), torch.arange(5)
    blocks = []
    for make in (ContextBlock, structured_block):
        torch.manual_seed(0)
        block = make(16, 24)
        block.init_weights(embeddings, tokens, Phase1Config(weight_std=0.02))
        blocks.append(block.state_dict())
    assert all(torch.equal(value, blocks[1][name]) for name, value in blocks[0].items())


@pytest.mark.parametrize(
    ("block", "shapes", "attention", "sentence"),
    [
        ({"longest_mean": 3}, {}, {}, r"block\.longest_mean is 3; allowed: 0, or 4 or more\."),
        ({"last_tokens": 1}, {}, {}, r"block\.last_tokens is 1; allowed: 0, or 2 or more\."),
        (
            {"longest_mean": 9},
            {"context_dim": 25},
            {},
            r"model\.context_dim is 25; allowed: at most model\.hidden_size \(24\) with block\.longest",
        ),
        ({"last_tokens": 16}, {}, {}, r"block\.last_tokens is 16; allowed: 2 to 15 with these shapes\."),
        (
            {"last_tokens": 2},
            {"context_dim": 50},
            {},
            r"block\.last_tokens is 2; allowed: 3 to 49 with these shapes\.",
        ),
        (
            {},
            {"anchor": "grid"},
            {"slots": "geometric"},
            r"model\.anchor is 'grid'; allowed: current with attention\.slots=geometric",
        ),
        (
            {},
            {"anchor": "grid"},
            {"copy_weight": 0.1},
            r"model\.anchor is 'grid'; allowed: current with attention\.copy_weight",
        ),
        ({}, {}, {"copy_weight": 1.0}, r"attention\.copy_weight is 1\.0; allowed: 0 or more, less than 1"),
    ],
)
def test_plug_ins_refuse_settings_in_a_sentence(block, shapes, attention, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_model(block, shapes, **attention)


def shift_register(streams):
    """A model whose contexts hold the last 6 tokens, embeddings of 100 tokens, and the streams' contexts."""
    shapes = {"hidden_size": 200, "context_dim": 256, "num_heads": 5, "interval": 5, "max_contexts": 6}
    model = tiny_model({"last_tokens": 6}, shapes, heads="induction", sink="learned").eval()
    embeddings = F.layer_norm(torch.randn(100, 200) + torch.randn(200), (200,))
    model.context_block.init_weights(embeddings, streams.flatten(), Phase1Config())
    model.attention.init_from_block(model.context_block)
    return model, embeddings, recurrence(model.context_block, embeddings, streams)


def test_contexts_hold_the_last_tokens_one_by_one():
    torch.manual_seed(0)
    model, _, contexts = shift_register(torch.randint(0, 100, (20, 150)))
    size = model.context_block.place_size
    assert size == 42
    places = contexts[:, 51:, :252].unflatten(2, (6, size))
    assert places.std().item() == pytest.approx(1, rel=0.1)
    for place in range(1, 6):
        earlier = places[:, :-place, 0] - places[:, place:, place]
        assert earlier.square().mean() < 0.05
    assert contexts[:, 51:, 252:].std() < 0.1  # what is left over holds nothing


def test_induction_heads_find_what_followed_the_current_token():
    """A token that comes again is found wherever it stood in the window, by the head of its place alone."""
    torch.manual_seed(0)
    stream = torch.randperm(100)[:80]
    back = torch.arange(1, 30)
    again = torch.cat([stream.expand(29, -1), stream[80 - back, None]], dim=1)
    model, embeddings, contexts = shift_register(again)
    windows = contexts[:, model.window.rows(torch.tensor(80))]
    attended, weights = model.attention.attention.attend(embeddings[again[:, 80]], windows, None)
    slot, place = (back - 1) // 5, (back - 1) % 5  # of the token that followed, one token nearer
    assert torch.equal(weights.flatten(1).argmax(dim=1), place * 6 + slot)
    assert torch.equal((attended @ embeddings.T).argmax(dim=1), again.gather(1, 81 - back[:, None])[:, 0])
    assert attended.norm(dim=1).mean().item() == pytest.approx(200**0.5, rel=0.3)  # an embedding's


def test_induction_heads_attend_almost_nothing_at_a_new_token():
    torch.manual_seed(0)
    stream = torch.randperm(100)
    model, embeddings, contexts = shift_register(stream[None])
    positions = torch.arange(30, 100)
    rows = model.window.rows(positions)
    _, weights = model.attend(embeddings[stream[positions]], contexts[0, rows], rows > 0)
    assert weights.sum(dim=2).median() < 0.1  # of a head
    mean_query = model.attention.attention.q(embeddings.mean(dim=0))
    assert mean_query.abs().max() < 1e-3  # it looks for no token


def test_more_heads_than_places_look_in_the_same_places_again():
    model = tiny_model({"last_tokens": 4}, {"num_heads": 8}, heads="induction")
    model.attention.init_from_block(model.context_block)
    keys = model.attention.attention.k.weight.unflatten(0, (8, 3))
    assert torch.equal(keys[3:6], keys[:3])
    assert not torch.equal(keys[1], keys[0])


@pytest.mark.parametrize("block", [ContextBlock(16, 24), structured_block(16, 24, longest_mean=9)])
def test_induction_heads_need_a_block_with_last_tokens(block):
    with pytest.raises(
        ValueError, match=r"attention\.heads is 'induction'; allowed: random, or induction with"
    ):
        tiny_model(heads="induction").attention.init_from_block(block)


def plain_layer(layer, embeddings, window, mask):
    """The layer as its definition reads: keys and values of every slot, softmax over slots and sink."""
    attention, inner = layer.attention, layer.feed_forward
    heads = (attention.num_heads, attention.head_dim)
    x = layer.input_dropout(embeddings)
    q = attention.q(x).unflatten(-1, heads)
    k, v = attention.k(window).unflatten(-1, heads), attention.v(window).unflatten(-1, heads)
    scores = torch.einsum("nhd,nshd->nhs", q, k) / attention.head_dim**0.5
    if attention.slot_bias is not None:
        scores = scores + attention.slot_bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    exponentials = scores.exp()
    nothing = 0 if attention.sink is None else attention.sink.exp()[:, None]
    weights = exponentials / (exponentials.sum(-1, keepdim=True) + nothing)
    mixed = torch.einsum("nhs,nshd->nhd", attention.dropout(weights), v)
    attended = layer.layer_dropout(attention.out(mixed.flatten(1)))
    hidden = attention.norm(x + attended)
    added = inner.norm(inner.dropout(inner.down(inner.dropout(F.gelu(inner.up(hidden))))))
    return (hidden if layer.settings.residual == "on" else attended) + added


def positions_of(model, positions, dtype=torch.float32):
    """Embeddings, window and presence of slots at positions of random contexts."""
    rows = model.window.rows(torch.tensor(positions))
    contexts = torch.randn(42, TINY["context_dim"], dtype=dtype)
    contexts[0] = 0
    return torch.randn(len(positions), TINY["hidden_size"], dtype=dtype), contexts[rows], rows > 0


@pytest.mark.parametrize("settings", [{}, {"input_dropout": 0.2, "layer_dropout": 0.4, "residual": "off"}])
@pytest.mark.parametrize("kv_method", ["fixed", "variable"])
@pytest.mark.parametrize("slot_bias", ["none", "learned", "per_head"])
@pytest.mark.parametrize("sink", ["none", "learned"])
def test_the_layer_equals_projected_keys_and_values(settings, kv_method, slot_bias, sink):
    """Values and gradients, with every dropout drawn in the same order."""
    shapes = {"kv_method": kv_method, "attention_dropout": 0.5 if settings else 0.0}
    model = tiny_model(None, shapes, slot_bias=slot_bias, sink=sink, **settings).double().train()
    layer = model.attention
    for learned in (layer.attention.sink, layer.attention.slot_bias):
        if learned is not None:
            learned.data += torch.randn_like(learned)
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
        layer.zero_grad()
        (hidden * direction).sum().backward()
        gradients = {n: p.grad for n, p in layer.named_parameters() if n != "attention.k.bias"}
        results.append((hidden.detach(), gradients))
    (fast, fast_gradients), (plain, plain_gradients) = results
    torch.testing.assert_close(fast, plain)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, msg=name)


@pytest.mark.parametrize(
    ("slot_bias", "heads", "slots", "preferred", "bias"),
    [
        ("per_head", 2, 5, [0, 1], 1.9523),
        ("per_head", 4, 3, [0, 1, 2, None], 1.2592),
        ("nearest", 8, 32, [1, 1, 1, 2, 2, 3, 3, 4], 4.0),
        ("nearest", 4, 3, [1, 2, 2, 2], 1.2592),
        ("nearest", 1, 32, [1], 4.0),
        ("nearest", 2, 1, [0, 0], 0.0),
    ],
)
def test_heads_prefer_a_slot_of_their_own_or_one_of_the_nearest(slot_bias, heads, slots, preferred, bias):
    layer = tiny_model(None, {"num_heads": heads, "max_contexts": slots}, slot_bias=slot_bias).attention
    layer.attention.k.weight.data.zero_()  # no slot is like the token
    embeddings, window = torch.randn(1, TINY["hidden_size"]), torch.randn(1, slots, TINY["context_dim"])
    _, weights = layer(embeddings, window, torch.ones(1, slots, dtype=torch.bool))
    for found, slot in zip(weights[0], preferred, strict=True):
        scores = torch.zeros(slots) if slot is None else bias * F.one_hot(torch.tensor(slot), slots)
        torch.testing.assert_close(found, scores.softmax(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("interval", [1, 2, 20])
@pytest.mark.parametrize("max_contexts", [1, 2, 3, 32])
def test_geometric_slots_rise_without_a_gap_to_the_reach_of_uniform_ones(interval, max_contexts):
    offsets = geometric_offsets(ModelConfig(interval=interval, max_contexts=max_contexts))
    steps = [further - nearer for nearer, further in pairwise(offsets)]
    assert len(offsets) == max_contexts
    assert (offsets[0], offsets[-1]) == (0, interval * (max_contexts - 1))
    assert all(step >= 1 for step in steps)
    assert max_contexts < 3 or steps[0] == 1


def test_the_window_has_the_slots_of_the_attention():
    assert geometric_offsets(ModelConfig())[:16] == [*range(14), 16, 20]
    assert tiny_model(slots="geometric").window.offsets == [0, 1, 3, 9]
    assert tiny_model().window.offsets == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, 6_300_928),
        ({"slot_bias": "none"}, 6_301_440),
        ({"slot_bias": "none", "sink": "learned"}, 6_300_680),
        ({"sink": "learned"}, 6_300_936),
    ],
)
def test_parameters_of_recipe_tuned_at_full_size(changes, trained):
    recipe = build_config("offline", "tuned").plugins["attention"].settings
    with torch.device("meta"):
        attention = SlotAttention.Settings(**{**recipe, **changes})
        model = ContextKV(ModelConfig(), parts=Parts(attention=partial(SlotAttention, settings=attention)))
    assert parameter_counts(model) == {"total": 38_861_824 + trained, "trainable_phase2": trained}
