"""Mixers, which stand in the place of contexts, and the block of tokens."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES, TINY, tiny_ids

from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.config import ModelConfig, Phase1Config
from ctxkv_lib.method.evaluation import token_scores
from ctxkv_lib.method.model import ContextKV, Parts
from ctxkv_lib.research import mixers
from ctxkv_lib.research.mixers import CausalAttention, EndToEnd, GRUMixer, NoContext, TokenBlock
from ctxkv_lib.research.tuned import SlotAttention, StructuredBlock
from ctxkv_lib.runs import rows
from ctxkv_lib.runs.models import parameter_counts
from ctxkv_lib.runs.rows import MixerModel, TokenRows, as_read

MIXERS = (NoContext, CausalAttention, GRUMixer, EndToEnd)
VOCABULARY = TINY["vocab_size"]


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    """Several rows to a batch, and gradients that end within a row."""
    monkeypatch.setattr(rows, "LONGEST_ROW", 23)
    monkeypatch.setattr(mixers, "GRADIENT_TOKENS", 5)


def tiny_model(kind, shapes=None, **settings):
    torch.manual_seed(0)
    config = ModelConfig(**{**SHAPES, **(shapes or {})})
    return MixerModel(config, partial(kind, settings=kind.Settings(**settings)), VOCABULARY)


def stream(model, ids, trained=False, history=None):
    history = model.history(trained) if history is None else history
    return TokenRows(ids.int(), torch.zeros(len(ids), 0), chunk=10, history=history)


@torch.no_grad()
def hidden_states(model, ids):
    model.eval()
    return stream(model, ids).attend(model, torch.arange(len(ids) - 1))[0]


@pytest.mark.parametrize(
    ("kind", "trained", "histories"),
    [
        (NoContext, 6_300_930, (0, 0)),
        (CausalAttention, 6_300_669, (639, 639)),
        (GRUMixer, 6_301_683, (128, 640)),
        (EndToEnd, 6_301_525, (620 + 128, 620 + 640)),
    ],
)
def test_trained_weights_and_histories_of_training_and_evaluation(kind, trained, histories):
    """As many weights as attention to contexts, 6,300,928, within a unit of feed-forward; a ContextBlock is
    among those of `EndToEnd`. The window is 20 x 32 tokens, its last slot 620 back."""
    with torch.device("meta"):
        model = MixerModel(ModelConfig(), partial(kind, settings=kind.Settings()))
    assert parameter_counts(model)["trainable_phase2"] == trained
    assert (model.history(True), model.history(False)) == histories


@pytest.mark.parametrize(
    ("kind", "reach"), [(NoContext, 0), (CausalAttention, 11), (GRUMixer, None), (EndToEnd, None)]
)
@pytest.mark.parametrize("changed", [0, 17, 41])
def test_a_token_reaches_no_position_before_it_and_those_behind_as_far_as_it_should(kind, reach, changed):
    """The window is 3 x 4 tokens; a recurrence reads on from the beginning of its row."""
    model, ids = tiny_model(kind), tiny_ids(60)
    if kind is CausalAttention:
        torch.nn.init.normal_(model.attention.bias)
    other = ids.clone()
    other[changed] = (ids[changed] + 1) % VOCABULARY
    moved = (hidden_states(model, other) - hidden_states(model, ids)).abs().amax(dim=1)
    assert moved[changed] > 1e-4
    reached = (moved > 1e-6).nonzero().flatten() - changed
    assert reached.min() == 0
    assert reached.max() == reach if reach is not None else reached.max() > 5


def test_causal_attention_prefers_the_same_distances_as_attention_to_contexts():
    bias = tiny_model(CausalAttention, {"num_heads": 2}, slot_bias="nearest").attention.bias
    assert (bias > 0).nonzero().tolist() == [[0, 1], [1, 4]]


@torch.no_grad()
def test_autocast_does_not_round_the_state_of_a_gru():
    """On a GPU it would be fp16, whatever autocast is asked for."""
    layer, rows = tiny_model(GRUMixer).eval().attention, torch.randn(2, 30, TINY["hidden_size"])
    layer.out = torch.nn.Identity()
    expected = layer.mix(rows, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.mix(rows, 3), expected)


def test_attention_can_train_on_the_chunks_that_mixers_train_on():
    model = ContextKV(ModelConfig(**SHAPES), VOCABULARY)
    model.attention.chunk = 10
    cache = StreamCache(tiny_ids(70).int(), torch.randn(70, SHAPES["context_dim"]))
    as_rows = stream(tiny_model(GRUMixer), tiny_ids(70))
    for trained, order in ((True, as_rows.epoch_order(3, 1)), (False, cache.epoch_order(3, 1))):
        assert as_read(model, cache, trained).epoch_order(3, 1).tolist() == order.tolist()


def test_causal_attention_is_the_formula_written_out():
    model, ids = tiny_model(CausalAttention), tiny_ids(50)
    torch.nn.init.normal_(model.attention.bias)
    layer, x = model.attention, model.embed(ids[:-1])
    width = TINY["hidden_size"] // TINY["num_heads"]
    expected = []
    for i in range(len(x)):
        heads = []
        for head in range(TINY["num_heads"]):
            part, seen = slice(head * width, (head + 1) * width), range(max(0, i - 11), i + 1)
            scores = [layer.q(x[i])[part] @ layer.k(x[j])[part] / width**0.5 for j in seen]
            biased = torch.stack(scores) + layer.bias[head, [i - j for j in seen]]
            heads.append(biased.softmax(0) @ torch.stack([layer.v(x[j])[part] for j in seen]))
        expected.append(layer.norm(x[i] + layer.out(torch.cat(heads))))
    hidden = torch.stack(expected)
    expected = hidden + layer.feed_forward(hidden)
    torch.testing.assert_close(hidden_states(model, ids), expected, atol=1e-5, rtol=1e-4)


def test_rows_give_what_reading_the_whole_stream_gives():
    """Chunks and history cut the stream of an epoch elsewhere than rows of validation do."""
    model, ids = tiny_model(GRUMixer).eval(), tiny_ids(70)
    whole = model.attention(model.embed(ids[:-1])[None], 0)[0]
    torch.testing.assert_close(hidden_states(model, ids)[:23], whole[:23], atol=1e-5, rtol=1e-4)
    read = stream(model, ids, history=100)
    order = read.epoch_order(3, 1)
    assert sorted(order.tolist()) == list(range(69))
    assert order.tolist() != sorted(order.tolist())
    assert (order[1:][order.diff() != 1] % 10).any()  # chunks do not begin at multiples in every epoch
    found = torch.cat([batch.attend(model)[0] for batch in read.batches(order, 16, model)])
    torch.testing.assert_close(found, whole[order], atol=1e-5, rtol=1e-4)
    rest = read.epoch(3, 1, 32, 16, model, lambda rows: slice(0, rows))  # of a training that was stopped
    found = torch.cat([batch.attend(model)[0] for batch in rest])
    torch.testing.assert_close(found, whole[order[32:]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [NoContext, CausalAttention, GRUMixer])
def test_without_the_residual_the_token_is_left_out(kind):
    layers = [tiny_model(kind, residual=residual).attention.eval() for residual in ("on", "off")]
    embeddings = F.layer_norm(torch.randn(2, 15, 24), (24,))
    with_residual, without = (layer(embeddings, 3) for layer in layers)
    mixed = layers[0].mix(embeddings, 3)
    assert mixed.shape == (2, 12, 24)
    torch.testing.assert_close(with_residual - without, layers[0].norm(embeddings[:, 3:] + mixed) - mixed)


@pytest.mark.parametrize("place", ["input_dropout", "layer_dropout", "attention_dropout"])
@pytest.mark.parametrize("kind", MIXERS)
def test_dropout_acts_in_training_alone(kind, place):
    shapes = {"attention_dropout": 0.5 if place == "attention_dropout" else 0.0}
    settings = {} if place in shapes else {place: 0.5}
    model, ids = tiny_model(kind, shapes, **settings), tiny_ids(60)
    batch = stream(model, ids).gather(torch.arange(59), model.window)
    first, second = (batch.attend(model.train())[0] for _ in range(2))
    changed = (first - second).abs().amax()
    assert changed == 0 if kind is NoContext and place in shapes else changed > 0.01
    assert torch.equal(hidden_states(model, ids), hidden_states(model, ids))


@pytest.mark.parametrize("kv_method", ["fixed", "variable"])
@pytest.mark.parametrize("slots", ["uniform", "geometric"])
def test_an_end_to_end_block_gives_what_cached_contexts_give(kv_method, slots):
    """Logits as served, from a cache of exact contexts; and every weight that is trained gets a gradient."""
    own = {"slots": slots, "slot_bias": "learned", "current_token_bias": -5.0}
    model = tiny_model(EndToEnd, {"kv_method": kv_method}, **own).eval()
    ids, layer, everything = tiny_ids(80), model.attention, torch.arange(79)
    read = stream(model, ids, history=100)
    contexts = [torch.zeros(1, TINY["context_dim"])]
    for token in model.embed(ids[:-1]):
        inputs = layer.context_block.project_inputs(token[None])
        contexts.append(layer.context_block(contexts[-1], inputs))
    model.log_unigram = torch.randn(VOCABULARY)
    served, _ = layer.served(model)
    batch = StreamCache(ids.int(), torch.cat(contexts)).gather(everything, served.window)
    found, _ = read.attend(model, everything)
    logits = model.logits(found, ids[:-1])
    torch.testing.assert_close(logits, batch.logits(served), atol=1e-5, rtol=1e-4)
    losses, _ = token_scores(model, read, everything)
    torch.testing.assert_close(losses, F.cross_entropy(logits, ids[1:], reduction="none"))
    found.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert model.wte.weight.grad is None


def test_gradients_of_an_end_to_end_block_go_back_no_further_than_asked():
    model = tiny_model(EndToEnd)
    embeddings = model.embed(tiny_ids(12))[None].requires_grad_()
    last = model.attention._contexts(embeddings)[0, 8]
    (last * torch.randn(16)).sum().backward()  # gradients stop at columns 5 and 10
    assert (embeddings.grad[0].abs().sum(dim=1) > 0).tolist() == [*[False] * 5, *[True] * 4, *[False] * 3]


def test_an_end_to_end_block_is_initialised_with_its_heads():
    narrow = {"intermediate_size": 5}  # of which the block takes all but a unit
    model = tiny_model(EndToEnd, narrow, last_tokens=4, heads="induction")
    embeddings, tokens = torch.randn(50, 24), torch.randint(0, 50, (300,))
    alone = StructuredBlock(16, 24, StructuredBlock.Settings(last_tokens=4))
    alone.load_state_dict(model.attention.context_block.state_dict())
    model.attention.init_weights(embeddings, tokens, Phase1Config())
    alone.init_weights(embeddings, tokens, Phase1Config())
    block, attention = model.attention.context_block, model.attention.attention.attention
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in block.state_dict().items())
    assert attention.v.bias.count_nonzero() == 0  # as induction heads have it


@pytest.mark.parametrize(
    ("shapes", "settings", "sentence"),
    [
        ({"anchor": "grid"}, {}, r"model\.anchor is 'grid'; allowed: current with this mixer\."),
        ({}, {"copy_weight": 0.1}, r"mixer\.copy_weight is 0\.1; allowed: 0 with this mixer\."),
        ({}, {"last_tokens": 16}, r"mixer\.last_tokens is 16; allowed: 2 to 15 with these shapes\."),
    ],
)
def test_an_end_to_end_block_refuses_settings_in_a_sentence(shapes, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_model(EndToEnd, shapes, **settings)


def test_the_context_of_a_token_is_its_embedding_and_attention_to_it_trains_as_many_weights():
    """With the widths that the study sets: 768 and 2560."""
    settings = SlotAttention.Settings(slot_bias="learned")
    with torch.device("meta"):
        config = ModelConfig(context_dim=768, intermediate_size=2560)
        model = ContextKV(config, parts=Parts(TokenBlock, partial(SlotAttention, settings=settings)))
    assert parameter_counts(model)["trainable_phase2"] == 6_300_416
    with pytest.raises(ValueError, match=r"model\.context_dim is 256; allowed: model\.hidden_size \(768\)"):
        TokenBlock(256, 768)
    inputs = torch.randn(5, 24)
    assert torch.equal(TokenBlock(24, 24)(torch.randn(5, 24), inputs), inputs)


@pytest.mark.parametrize("kind", MIXERS)
def test_batches_split_for_memory_give_the_same_scores(kind):
    model, ids = tiny_model(kind).eval(), tiny_ids(90)
    read = stream(model, ids, history=100)
    with torch.no_grad():
        whole, _ = token_scores(model, read, torch.arange(89))
        parts = [
            part.attend(model)[0]
            for batch in read.batches(torch.arange(89), 50, model)
            for part, _ in batch.split(3)
        ]
        direct = F.cross_entropy(model.logits(torch.cat(parts), ids[:-1]), ids[1:], reduction="none")
    torch.testing.assert_close(direct, whole, atol=1e-5, rtol=1e-4)
