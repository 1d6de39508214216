from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from ctxkv_lib.hf.modeling import CACHE_NAME, LONG, ContextKVConfig, ContextKVForCausalLM, parameter_counts
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.windows import window_rows

PARTS = {
    "wte": 38_597_376,
    "embedding_norm": 1_536,
    "context_block": 262_400 + 512,
    "attention": 1_577_472,
    "feed_forward": 4_723_968,
}


# Everything that the published model does without.
LEVERS = {
    "slots": "geometric",
    "slot_bias": "learned",
    "output": "attended",
    "input_dropout": 0.2,
    "layer_dropout": 0.4,
    "has_unigram": True,
    "repeat_logit": -2.5,
}


def test_published_parameter_counts():
    with torch.device("meta"):
        model = ContextKVForCausalLM(ContextKVConfig())
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    counted = {name: count for name, count in counted.items() if count}
    assert counted == PARTS
    assert parameter_counts(model) == {"total": 45_163_264, "trainable_phase2": 6_301_440}


def test_initial_weights():
    block = tiny_model(context_dim=64, hidden_size=96).context_block
    assert block.linear.weight.std().item() == pytest.approx(0.1, rel=0.03)
    assert block.linear.bias.std().item() == pytest.approx(0.01, rel=0.3)
    model, linear = tiny_model(), torch.nn.Linear(TINY["hidden_size"], TINY["hidden_size"])
    assert model.attention.q.weight.abs().max() <= linear.weight.abs().max() * 1.1


def test_a_linear_block_keeps_and_adds_what_it_was_told():
    """Beside the recurrence in plain numbers, over random tokens."""
    block, draw = tiny_model(context_dim=64, hidden_size=96).context_block, torch.Generator().manual_seed(0)
    kept, mean = torch.linspace(0, 0.97, 63), torch.randn(96, generator=draw)
    weights = torch.randn(63, 96, generator=draw) * ((1 - kept**2) / 96).sqrt()[:, None]
    block.make_linear(torch.diag(kept), weights, mean, 63 / 64)
    state = torch.zeros(20, 64)
    expected, states = state[:, :-1], []
    for _ in range(100):
        tokens = mean + torch.randn(20, 96, generator=draw)
        state = block(state, block.project_tokens(tokens)).detach()
        expected = kept * expected + (tokens - mean) @ weights.T
        assert state[:, -1].abs().max() == 0
        states.append((state[:, :-1], expected))
    linear, wanted = (torch.stack(each) for each in zip(*states, strict=True))
    assert wanted.std().item() == pytest.approx(1, rel=0.1)
    assert (linear - wanted).square().mean() < 0.05  # what units have in common, which the norm takes off


@pytest.mark.parametrize(("phase", "trained"), [(1, {"context_block"}), (2, {"attention", "feed_forward"})])
def test_only_the_phase_gets_gradients(phase, trained):
    model = tiny_model()
    model.set_phase(phase)
    ids = tiny_ids(20)[None]
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in gradients} == trained
    assert all(gradient is not None for gradient in gradients.values())
    zero = {name for name, gradient in gradients.items() if not gradient.any()}
    assert zero == ({"attention.k.bias"} if phase == 2 else set())  # it cannot change the softmax
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def projected_attention(attention, embeddings, window, present):
    """The layer as its definition reads: keys and values of every slot, then softmax over them."""
    heads = (attention.num_heads, attention.head_dim)
    q = attention.q(embeddings).unflatten(-1, heads)
    k, v = attention.k(window).unflatten(-1, heads), attention.v(window).unflatten(-1, heads)
    scores = torch.einsum("nhd,nshd->nhs", q, k) / attention.head_dim**0.5
    if attention.slot_bias is not None:
        scores = scores + attention.slot_bias
    if present is not None:
        scores = scores.masked_fill(~present[:, None], float("-inf"))
    exponentials = scores.exp()
    nothing = 0 if attention.sink is None else attention.sink.exp()[:, None]
    weights = exponentials / (exponentials.sum(-1, keepdim=True) + nothing)
    mixed = torch.einsum("nhs,nshd->nhd", attention.dropout(weights), v)
    return attention.norm(embeddings + attention.out(mixed.flatten(1)))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slot_bias", ["none", "learned", "own"])
@pytest.mark.parametrize("sink", ["none", "learned"])
def test_attention_equals_projected_keys_and_values(dropout, masked, slot_bias, sink):
    model = tiny_model(attention_dropout=dropout, slot_bias=slot_bias, sink=sink).double().train()
    attention = model.attention
    if sink == "learned":
        torch.nn.init.normal_(attention.sink)
    if slot_bias == "learned":  # "own" begins with numbers already
        torch.nn.init.normal_(attention.slot_bias)
    positions = torch.tensor([0, 1, 2, 3, 9, 10, 40])
    rows = window_rows(positions, model.config)
    contexts = torch.randn(42, TINY["context_dim"], dtype=torch.float64)
    contexts[0] = 0
    embeddings = torch.randn(len(positions), TINY["hidden_size"], dtype=torch.float64)
    present = rows > 0 if masked else None
    direction = torch.randn(len(positions), TINY["hidden_size"], dtype=torch.float64)

    results = []
    for layer in (lambda *a: attention(*a)[0], lambda *a: projected_attention(attention, *a)):
        torch.manual_seed(3)
        hidden = layer(embeddings, contexts[rows], present)
        attention.zero_grad()
        (hidden * direction).sum().backward()
        gradients = {n: p.grad for n, p in attention.named_parameters() if n != "k.bias"}
        results.append((hidden.detach(), gradients))
    (fast, fast_gradients), (plain, plain_gradients) = results
    torch.testing.assert_close(fast, plain)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, msg=name)
    if attention.k.bias is not None:
        assert attention.k.bias.grad.abs().max() < 1e-12  # the plain layer's: it cannot change the softmax


@pytest.mark.parametrize("shape", [{"kv_method": "fixed"}, {"kv_method": "variable"}, LEVERS])
@pytest.mark.parametrize("changed", [0, 1, 17, 30])
def test_no_position_sees_the_future(shape, changed):
    model = tiny_model(**shape).eval()
    ids = tiny_ids(31)[None]
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 1) % TINY["vocab_size"]
    before, after = model(ids).logits[0], model(other).logits[0]
    assert torch.equal(before[:changed], after[:changed])
    assert not torch.allclose(before[changed:], after[changed:])


@pytest.mark.parametrize("slot_bias", ["learned", "own", "near"])
def test_a_slot_bias_takes_the_place_of_the_keys_bias(slot_bias):
    shape = ModelConfig(slot_bias=slot_bias)
    with torch.device("meta"):
        counted = parameter_counts(ContextKVForCausalLM(ContextKVConfig(**asdict(shape))))
    assert counted == shape.parameter_counts()
    assert counted["trainable_phase2"] == 6_301_440 - 768 + 8 * 32


def test_a_sink_takes_the_place_of_the_keys_bias():
    with torch.device("meta"):
        counted = parameter_counts(ContextKVForCausalLM(ContextKVConfig(sink="learned")))
    assert counted == ModelConfig(sink="learned").parameter_counts()
    assert counted["trainable_phase2"] == 6_301_440 - 768 + 8


@pytest.mark.parametrize(("heads", "slots"), [(2, 5), (4, 3)])
def test_heads_begin_with_a_slot_of_their_own_as_far_as_slots_go(heads, slots):
    layer = tiny_model(slot_bias="own", num_heads=heads, max_contexts=slots).attention
    layer.k.weight.data.zero_()  # no slot is like the token
    embeddings, window = torch.randn(1, TINY["hidden_size"]), torch.randn(1, slots, TINY["context_dim"])
    _, _, weights = layer(embeddings, window, None)
    own = torch.tensor(4.0).exp() / (torch.tensor(4.0).exp() + slots - 1)
    assert weights[0].diagonal().tolist() == pytest.approx([own.item()] * min(heads, slots))
    assert weights[0, slots:].flatten().tolist() == pytest.approx([1 / slots] * slots * max(0, heads - slots))


@pytest.mark.parametrize(
    ("heads", "slots", "begin"),
    [(8, 32, [1, 1, 1, 2, 2, 3, 3, 4]), (4, 3, [1, 2, 2, 2]), (1, 32, [1]), (2, 1, [0, 0])],
)
def test_the_nearer_a_slot_the_more_heads_begin_with_it(heads, slots, begin):
    layer = tiny_model(slot_bias="near", num_heads=heads, max_contexts=slots).attention
    assert layer.slot_bias.argmax(dim=1).tolist() == begin
    assert layer.slot_bias.sum(dim=1).tolist() == [4.0] * heads


def test_output_attended_leaves_the_token_out():
    """The layer written out, with its own parts."""
    model, positions = tiny_model(**LEVERS).eval(), torch.tensor([0, 4, 20])
    embeddings, contexts = model.embed(tiny_ids(3)), torch.randn(22, TINY["context_dim"])
    rows = window_rows(positions, model.config)
    hidden, weights = model.attend(embeddings, contexts[rows], rows > 0)
    layer, inner = model.attention, model.feed_forward
    heads = (layer.num_heads, layer.head_dim)
    values = layer.v(contexts[rows]).unflatten(-1, heads)
    attended = layer.out(torch.einsum("nhs,nshd->nhd", weights, values).flatten(1))
    added = inner.norm(inner.down(F.gelu(inner.up(layer.norm(embeddings + attended)))))
    torch.testing.assert_close(hidden, attended + added)


def test_logits_have_in_them_what_was_counted():
    model, hidden = tiny_model(**LEVERS), torch.randn(2, 3, TINY["hidden_size"])
    shares, read = torch.rand(TINY["vocab_size"]).double(), tiny_ids(6).view(2, 3)
    model.load_unigram(shares)
    expected = hidden @ model.wte.weight.T + shares.float().log()
    expected -= 2.5 * F.one_hot(read, TINY["vocab_size"])
    torch.testing.assert_close(model.logits(hidden, read), expected)
    targets = tiny_ids(8)[2:].view(2, 3)
    losses, _ = model.losses(hidden.flatten(0, 1), read.flatten(), targets.flatten())
    torch.testing.assert_close(
        losses, F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="none")
    )


def test_dropout_is_the_same_drawn_before_or_within():
    model = tiny_model(**LEVERS, attention_dropout=0.3).train()
    rows = window_rows(torch.arange(40), model.config)
    batch = model.embed(tiny_ids(40)), torch.randn(41, TINY["context_dim"])[rows], rows > 0
    torch.manual_seed(7)
    within, _ = model.attend(*batch)
    torch.manual_seed(7)
    drawn = model.drawn_dropout(40)
    before, _ = model.attend(*batch, drawn)
    assert all(factors is not None and (factors == 0).any() for factors in drawn)
    torch.testing.assert_close(before, within)
    second, _ = model.attend(*(part[23:] for part in batch), drawn.rows(slice(23, 40)))
    torch.testing.assert_close(second, within[23:])


def test_kv_methods_agree_once_the_window_is_full():
    ids = tiny_ids(30)[None]
    fixed, variable = (tiny_model(kv_method=m).eval()(ids).logits[0] for m in ("fixed", "variable"))
    full = TINY["interval"] * (TINY["max_contexts"] - 1)
    torch.testing.assert_close(fixed[full:], variable[full:])
    assert not torch.allclose(fixed[:full], variable[:full])


def test_loss_and_kept_logits():
    model, ids = tiny_model().eval(), tiny_ids(12).view(2, 6)
    whole = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(whole.loss, expected)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])


def test_logits_are_kept_by_column(tmp_path):
    model, ids = tiny_model().eval(), tiny_ids(12).view(2, 6)
    whole, columns = model(ids).logits, torch.tensor([4, 0, 5])
    torch.testing.assert_close(model(ids, logits_to_keep=columns).logits, whole[:, columns])
    torch.testing.assert_close(model(ids, labels=ids, logits_to_keep=columns).logits, whole[:, columns])


def test_outputs_come_as_a_tuple_if_asked():
    model, ids = tiny_model().eval(), tiny_ids(12).view(2, 6)
    named = model(ids, labels=ids, output_attentions=True)
    loss, logits, (weights,) = model(ids, labels=ids, output_attentions=True, return_dict=False)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    assert torch.equal(weights, named.attentions[0])


def test_generate_gives_attentions():
    model, ids = tiny_model().eval(), tiny_ids(12).view(2, 6)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    made = model.generate(ids, output_attentions=True, **options)
    whole = model(made.sequences[:, :-1], output_attentions=True).attentions[0]
    steps = torch.cat([weights for (weights,) in made.attentions], dim=2)
    torch.testing.assert_close(steps, whole)
    assert model.generate(ids, **options).attentions is None


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_nothing_to_read_is_refused(shape):
    with pytest.raises(ValueError, match=r"input_ids\.shape is .* allowed: one row and one token or more"):
        tiny_model()(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(1, 4), (2, 5), (1, 1, 5, 5)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask\.shape is .* allowed: \(1, 5 or more\)"):
        tiny_model()(tiny_ids(5)[None], attention_mask=torch.ones(shape))


@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"
)  # since 5.24
def test_gradient_checkpointing_is_refused():
    with pytest.raises(ValueError, match=r"does not support (activation|gradient) checkpointing"):
        tiny_model().gradient_checkpointing_enable()


@pytest.mark.parametrize("phase", [1, 2])
def test_a_distributed_wrapper_trains_it(tmp_path, phase):
    plain, model = tiny_model(attention_dropout=0.0), tiny_model(attention_dropout=0.0)
    init = f"file://{tmp_path / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    try:
        model.set_phase(phase)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for ids in tiny_ids(60).view(3, 1, 20):
            model.zero_grad()
            wrapped(ids, labels=ids).loss.backward()  # stops here if a parameter had no gradient before
    finally:
        torch.distributed.destroy_process_group()
    plain.set_phase(phase)
    plain(ids, labels=ids).loss.backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)


@pytest.mark.parametrize("shape", [{"kv_method": "variable"}, LEVERS])
def test_saved_model_is_the_same_and_still_frozen(tmp_path, shape):
    model = tiny_model(**shape).eval()
    if model.log_unigram is not None:
        model.load_unigram(torch.rand(TINY["vocab_size"]))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tiny_ids(15)[None]
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"wte", "embedding_norm", "context_block"}
    assert AutoConfig.from_pretrained(tmp_path).max_contexts == TINY["max_contexts"]


def test_config_refuses_what_the_model_cannot_be():
    with pytest.raises(ValueError, match="divisor"):
        ContextKVConfig(num_heads=7)
    with pytest.raises(ValueError, match=r"model\.anchor is 'grid'; allowed: current with"):
        ContextKVConfig(slots="geometric", anchor="grid")


@pytest.mark.parametrize("length", [20, LONG + 1])
def test_autocast_rounds_what_is_made_of_contexts_and_not_the_contexts(length):
    """As a trainer in bf16 has it; rounded on and on, contexts would drift, and long texts never settle."""
    model, ids = tiny_model().eval(), tiny_ids(length)[None]
    cached = {}
    with torch.no_grad():
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found = model(ids, use_cache=True)
            cached[enabled] = found[CACHE_NAME].state
    assert torch.equal(cached[True], cached[False])
    assert found.logits.dtype == torch.bfloat16
