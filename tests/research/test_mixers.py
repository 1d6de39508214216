import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_ids
from ctxkv_lib.research.memories import TokenBlock
from ctxkv_lib.research.models import model_class, shapes_of, stream_of
from ctxkv_lib.training.phase2 import train_attention

from ctxkv_lib.hf.modeling import parameter_counts
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.contexts import distinct_rows, exact_contexts
from ctxkv_lib.method.evaluation import evaluate, token_scores
from ctxkv_lib.research import models, rows
from ctxkv_lib.runs.config import Phase2Config

BASELINES = ("fresh", "end_to_end", "tokens", "none", "transformer", "gru")
COMPUTED = ("end_to_end", "none", "transformer", "gru")


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    """Several rows to a batch, and segments shorter than a row."""
    monkeypatch.setattr(rows, "CHUNK", 10)
    monkeypatch.setattr(rows, "LONGEST_ROW", 23)
    monkeypatch.setattr(models, "SEGMENT", 5)


def tiny_baseline(memory, seed=0, **changes):
    torch.manual_seed(seed)
    kind = model_class(memory)
    return kind(kind.config_class(**{**TINY, "memory": memory, **changes}))


def stream(model, ids, trained=False):
    """As a run makes it: contexts that are cached, or none."""
    shapes = shapes_of(model.config)
    contexts = torch.zeros(len(ids), shapes.memory_dim)
    if shapes.memory_dim:
        embeddings, tokens = distinct_rows(model, ids[:-1])
        half = model.context_block.project_tokens(embeddings)
        exact_contexts(model.context_block, half, tokens, 1e-5, out=contexts)
    return stream_of(StreamCache(ids.int(), contexts), shapes, trained)


def hidden_states(model, ids):
    read = stream(model.eval(), ids)
    with torch.no_grad():
        return read.gather(torch.arange(len(read)), model.config).attend(model)[0]


@pytest.mark.parametrize("memory", BASELINES)
def test_a_baseline_trains_as_many_weights_as_contexts_do(memory):
    """At the published shapes, counted from these; and at small ones what is counted is what there is."""
    published = ModelConfig().parameter_counts()["trainable_phase2"]
    assert ModelConfig(memory=memory).parameter_counts()["trainable_phase2"] == pytest.approx(
        published, rel=1e-3
    )
    model = tiny_baseline(memory, vocab_size=5, hidden_size=48, context_dim=20)
    assert parameter_counts(model) == shapes_of(model.config).parameter_counts()


@pytest.mark.parametrize("memory", BASELINES)
def test_changing_a_token_changes_nothing_before_it(memory):
    model, ids = tiny_baseline(memory), tiny_ids(60)
    before = hidden_states(model, ids)
    for changed in (0, 17, 41):
        other = ids.clone()
        other[changed] = (ids[changed] + 1) % TINY["vocab_size"]
        moved = (hidden_states(model, other) - before).abs().amax(dim=1)
        assert moved[:changed].max() < 1e-6 if changed else True
        assert moved[changed] > 1e-4


@pytest.mark.parametrize(("memory", "reach"), [("none", 0), ("transformer", 11), ("tokens", 9), ("gru", 30)])
def test_a_baseline_remembers_as_far_as_it_should(memory, reach):
    """The window is 3 x 4 tokens, its last slot 9 back; a GRU reads on from the beginning of its row."""
    model, ids = tiny_baseline(memory), tiny_ids(60)
    if memory == "transformer":
        torch.nn.init.normal_(model.attention.bias)
    other = ids.clone()
    other[20] = (ids[20] + 1) % TINY["vocab_size"]
    moved = (hidden_states(model, other) - hidden_states(model, ids)).abs().amax(dim=1) > 1e-7
    reached = moved.nonzero().flatten() - 20
    assert reached.min() == 0
    if memory == "gru":
        assert reached.max() > 5
    else:
        assert reached.max() == reach


def test_attention_to_all_tokens_begins_with_the_same_ones_as_that_to_contexts():
    layer = tiny_baseline("transformer", slot_bias="near", num_heads=2).attention
    assert layer.bias.tolist() == [[0, 4, *[0] * 10], [0, 0, 0, 0, 4, *[0] * 7]]


def test_rows_answer_as_one_reading_of_the_whole_stream_does():
    """A GRU from the beginning; chunks and history cut the stream elsewhere than rows of validation do."""
    model, ids = tiny_baseline("gru").eval(), tiny_ids(70)
    whole = _gru_by_hand(model, ids[:-1])
    whole = whole + model.feed_forward(whole)
    torch.testing.assert_close(hidden_states(model, ids)[:23], whole[:23], atol=1e-5, rtol=1e-4)
    read = stream(model, ids)
    read.history = 100
    order = read.epoch_order(3, 1)
    assert sorted(order.tolist()) == list(range(69))
    assert order.tolist() != sorted(order.tolist())
    found = torch.cat([batch.attend(model)[0] for batch in read.batches(order, 16, model)])
    torch.testing.assert_close(found, whole[order], atol=1e-5, rtol=1e-4)


def _gru_by_hand(model, ids):
    memory, x = model.attention, model.embed(ids)
    state = torch.zeros(1, memory.gru.hidden_size)
    out = []
    for token in x:
        gates_x = F.linear(token[None], memory.gru.weight_ih_l0, memory.gru.bias_ih_l0).chunk(3, dim=1)
        gates_h = F.linear(state, memory.gru.weight_hh_l0, memory.gru.bias_hh_l0).chunk(3, dim=1)
        reset, update = (torch.sigmoid(a + b) for a, b in zip(gates_x[:2], gates_h[:2], strict=True))
        fresh = torch.tanh(gates_x[2] + reset * gates_h[2])
        state = (1 - update) * fresh + update * state
        out.append(memory.norm(token[None] + memory.out(state)))
    return torch.cat(out)


def test_causal_attention_is_the_formula_written_out():
    model, ids = tiny_baseline("transformer").eval(), tiny_ids(50)
    torch.nn.init.normal_(model.attention.bias)
    layer, heads, x = model.attention, TINY["num_heads"], model.embed(ids[:-1])
    width = TINY["hidden_size"] // heads
    expected = []
    for i in range(len(x)):
        parts = []
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            seen = range(max(0, i - 11), i + 1)
            scores = torch.stack(
                [
                    layer.q(x[i])[columns] @ layer.k(x[j])[columns] / width**0.5 + layer.bias[head, i - j]
                    for j in seen
                ]
            )
            values = torch.stack([layer.v(x[j])[columns] for j in seen])
            parts.append(scores.softmax(0) @ values)
        expected.append(layer.norm(x[i] + layer.out(torch.cat(parts))))
    hidden = torch.stack(expected)
    expected = hidden + model.feed_forward(hidden)
    torch.testing.assert_close(hidden_states(model, ids), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("memory", BASELINES)
def test_the_levers_of_the_contexts_are_the_baselines_too(memory):
    """The head without the token's embedding, dropout everywhere, slots close by with a bias."""
    ids = tiny_ids(60)
    plain, attended = (tiny_baseline(memory, output=output) for output in ("residual", "attended"))
    attended.load_state_dict(plain.state_dict())
    assert (hidden_states(plain, ids) - hidden_states(attended, ids)).abs().max() > 0.1
    model = tiny_baseline(
        memory, input_dropout=0.5, layer_dropout=0.5, slots="geometric", slot_bias="learned"
    )
    batch = stream(model, ids).gather(torch.arange(59), model.config)
    first, second = (batch.attend(model.train())[0] for _ in range(2))
    assert (first - second).abs().min(dim=1).values.max() > 0
    drawn = model.drawn_dropout(59)
    if memory in ("fresh", "end_to_end", "tokens"):
        assert torch.equal(batch.attend(model, drawn)[0], batch.attend(model, drawn)[0])
    counted = shapes_of(model.config).parameter_counts()
    assert parameter_counts(model) == counted


@pytest.mark.parametrize("anchor", ["current", "grid"])
def test_an_end_to_end_block_gives_what_cached_contexts_give(anchor):
    """Values as from a cache of exact contexts; and every weight that is trained gets a gradient."""
    model, ids = tiny_baseline("end_to_end", anchor=anchor).eval(), tiny_ids(80)
    read = stream(model, ids)
    read.history = 100
    embeddings, tokens = distinct_rows(model, ids[:-1])
    half = model.context_block.project_tokens(embeddings)
    contexts, _ = exact_contexts(model.context_block, half, tokens, 1e-5)
    cached = StreamCache(ids.int(), contexts)
    everything = torch.arange(79)
    found = read.gather(everything, model.config).attend(model)[0]
    torch.testing.assert_close(found, cached.attend(model, everything)[0], atol=1e-5, rtol=1e-4)
    found.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum()]
    assert without == ["attention.k.bias"]  # which changes no output
    assert model.wte.weight.grad is None


def test_the_context_of_a_token_is_its_embedding():
    model, ids = tiny_baseline("tokens"), tiny_ids(40)
    read = stream(model, ids)
    assert isinstance(model.context_block, TokenBlock)
    torch.testing.assert_close(read.contexts[1:], model.embed(ids[:-1]))


@pytest.mark.parametrize("memory", BASELINES)
def test_training_lowers_the_loss_and_the_best_epoch_is_kept(memory, tmp_path):
    model, ids = tiny_baseline(memory), tiny_ids(40).repeat(12)  # what repeats can be learnt
    train, validation = stream(model, ids, True), stream(model, ids[:80])
    before = evaluate(model, validation).perplexity
    config = Phase2Config(max_epochs=2, batch_size=64, learning_rate=3e-3)
    result = train_attention(model, train, validation, config, 1, tmp_path / "c", "k", lambda _: None)
    best = min(epoch["val_ppl"] for epoch in result.epochs)
    assert best < 0.8 * before
    assert evaluate(model, validation).perplexity == pytest.approx(best)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("memory", ["gru", "end_to_end"])
def test_stopped_and_resumed_gives_the_same_numbers(memory, tmp_path, saved_at_every_step, monkeypatch):
    from ctxkv_lib.method import phase2

    ids, config = tiny_ids(300), Phase2Config(max_epochs=2, batch_size=64)
    original, steps = phase2.add_gradients, []

    def trained(name):
        model = tiny_baseline(memory)
        train, validation = stream(model, ids, True), stream(model, tiny_ids(60, seed=5))
        train_attention(model, train, validation, config, 1, tmp_path / name, "k", lambda _: None)
        return model.state_dict()

    def stopping(*batch):
        steps.append(1)
        if len(steps) == 8:
            raise Stopped
        return original(*batch)

    whole = trained("whole")
    monkeypatch.setattr(phase2, "add_gradients", stopping)
    with pytest.raises(Stopped):
        trained("stopped")
    for name, value in trained("stopped").items():
        assert torch.equal(value, whole[name]), name
    assert len(steps) == 2 * 5 + 1


@pytest.mark.parametrize("memory", COMPUTED)
def test_batches_split_for_memory_give_the_same_scores(memory):
    model, ids = tiny_baseline(memory).eval(), tiny_ids(90)
    read = stream(model, ids)
    read.history = 100
    with torch.no_grad():
        whole, _ = token_scores(model, read, torch.arange(89))
        parts = [batch.attend(model)[0] for batch in read.batches(torch.arange(89), 50, model, pieces=3)]
        direct = F.cross_entropy(model.logits(torch.cat(parts), ids[:-1]), ids[1:], reduction="none")
    torch.testing.assert_close(direct, whole, atol=1e-5, rtol=1e-4)
