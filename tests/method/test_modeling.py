"""The model for transformers equals the trained model, however its tokens are passed in."""

import tempfile

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, NearestTwo, tiny_ids, tiny_method, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from ctxkv_lib.method.contexts import distinct_rows, exact_contexts
from ctxkv_lib.method.modeling import CACHE_NAME, ContextKVForCausalLM
from ctxkv_lib.method.streams import Stream


def copying(weight):
    """Return arguments of `tiny_model` for a model that copies tokens, with this copy weight."""
    own = {"copy_weight": weight, "copy_sharpness": 5.0}
    return {"parts": {"layer": {"name": "SlotLayer", "settings": own}}}


MODELS = {"fixed": {}, "variable": {"kv_method": "variable"}, "copies": copying(0.4)}
each_model = pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)


def read_in_chunks(model, ids, cuts, mask):
    """Read `ids` `[batch, length]` in chunks that end at the columns `cuts`; return logits and the cache."""
    cache, logits = None, []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **{CACHE_NAME: cache})
        cache = out[CACHE_NAME]
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


def exact_cache(model, ids):
    """Return the cache that Phase 2 would read for one stream."""
    embeddings, tokens = distinct_rows(model, ids)
    inputs = model.context_block.project_inputs(embeddings)
    before = torch.zeros(TINY["context_dim"])
    contexts = exact_contexts(model.context_block, inputs, tokens, before, tolerance=1e-6)
    return Stream(torch.cat([ids, ids[:1]]).int(), contexts)


def phase2_logits(model, ids):
    (batch,) = model.batches(exact_cache(model, ids), torch.arange(len(ids)), len(ids))
    return torch.cat([*model.predictions(batch)])


@torch.no_grad()
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_way_of_reading_gives_the_same_logits(data):
    """Padding may be anywhere. When tokens are read one by one, no position can see the future."""
    length, padding = data.draw(st.integers(1, 40), "length"), data.draw(st.integers(0, 5), "padding")
    shape = data.draw(st.sampled_from([*MODELS.values()]), "model")
    interval, slots = data.draw(st.integers(1, 7), "interval"), data.draw(st.integers(1, 6), "max_contexts")
    model = tiny_model(interval=interval, max_contexts=slots, **shape).eval()
    ids, other = tiny_ids(length, seed=length), tiny_ids(length + padding, seed=1)
    whole = phase2_logits(model.model, ids)
    columns = data.draw(st.permutations(range(length + padding)), "columns")[:length]
    columns = data.draw(st.sampled_from([sorted(columns), range(length), range(padding, length + padding)]))
    batch, mask = torch.stack([torch.zeros_like(other), other]), torch.ones(2, length + padding).long()
    batch[0, columns], mask[0] = ids, 0
    mask[0, columns] = 1
    cuts = sorted(data.draw(st.sets(st.integers(1, length + padding)), "cuts") - {length + padding})
    for ends in ([], cuts, range(1, length + padding)):
        found, cache = read_in_chunks(model, batch, ends, mask)
        torch.testing.assert_close(found[0, columns], whole, atol=1e-4, rtol=0)
        torch.testing.assert_close(found[1], phase2_logits(model.model, other), atol=1e-4, rtol=0)
        assert (cache.lengths.tolist(), cache.get_seq_length()) == (
            [length, length + padding],
            length + padding,
        )
    kept = data.draw(st.integers(1, length + padding), "kept")
    some = torch.tensor([kept - 1, 0])
    for count, places in ((kept, slice(-kept, None)), (some, some)):
        with_states = bool(kept % 2)
        output = model(batch, attention_mask=mask, logits_to_keep=count, output_hidden_states=with_states)
        is_text = mask[:, places].bool()
        torch.testing.assert_close(output.logits[is_text], found[:, places][is_text], atol=1e-4, rtol=0)
    cache.reset()
    again = model(batch, attention_mask=mask, **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(again[1], found[1], atol=1e-4, rtol=0)


def greedy(model, prompt, count):
    """Generate token by token without a cache."""
    ids = prompt
    for _ in range(count):
        ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    return ids


@torch.no_grad()
@each_model
def test_generation_and_beam_search_give_the_same_with_and_without_a_cache(shape):
    model = tiny_model(**shape).eval()
    prompts = [tiny_ids(4, seed=4), tiny_ids(15, seed=15)]
    expected = [greedy(model, prompt, 12).tolist() for prompt in prompts]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for prompt, wanted in zip(prompts, expected, strict=True):
        assert model.generate(prompt[None], **options)[0].tolist() == wanted
        assert model.generate(prompt[None], use_cache=False, **options)[0].tolist() == wanted
    batch, mask = torch.zeros(2, 15).long(), torch.ones(2, 15).long()
    batch[0, 11:], batch[1], mask[0, :11] = *prompts, 0
    found = model.generate(batch, attention_mask=mask, **options)
    assert [found[0, 11:].tolist(), found[1].tolist()] == expected
    options |= {"num_beams": 3, "num_return_sequences": 3}  # several beams, since beams change places
    options |= {"return_dict_in_generate": True, "output_scores": True}
    searched, plain = (
        model.generate(tiny_ids(9)[None], use_cache=cached, **options) for cached in (True, False)
    )
    assert searched.sequences.tolist() == plain.sequences.tolist()
    torch.testing.assert_close(searched.sequences_scores, plain.sequences_scores)


@torch.no_grad()
@each_model
def test_a_cache_has_a_constant_size_and_its_rows_may_be_repeated_and_selected(shape):
    model, ids, new = tiny_model(**shape).eval(), tiny_ids(18).view(2, 9), tiny_ids(4, seed=1)[:, None]
    cache = model(ids)[CACHE_NAME]
    sizes = cache.contexts.shape, cache.tokens.shape
    cache.batch_repeat_interleave(2)
    found = model(new, **{CACHE_NAME: cache}).logits[:, -1]
    whole = model(torch.cat([ids.repeat_interleave(2, dim=0), new], dim=1)).logits[:, -1]
    torch.testing.assert_close(found, whole)
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert (cache.contexts.shape, cache.tokens.shape) == sizes
    assert cache.contexts.shape[1] == model.model.window.offsets[-1] + 1
    assert cache.get_max_length() == cache.get_max_cache_shape() == -1
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(1)
    assert torch.equal(model(ids, **{CACHE_NAME: DynamicCache()}).logits, model(ids).logits)


@pytest.mark.parametrize(("phase", "trained"), [(1, {"context_block"}), (2, {"layer"})])
def test_only_the_part_that_a_phase_trains_gets_gradients(phase, trained):
    model, ids = tiny_model(), tiny_ids(20)[None]
    model.model.set_phase(phase)
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in gradients} == trained
    assert all(gradient is not None for gradient in gradients.values())  # DDP waits for missing gradients
    zero = {name for name, gradient in gradients.items() if not gradient.any()}
    assert zero == ({"layer.attention.k.bias"} if phase == 2 else set())  # k.bias cannot change the softmax
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@each_model
@pytest.mark.parametrize("items", [None, 7])
def test_the_loss_is_the_cross_entropy_of_the_next_labels(shape, items):
    """Training ignores copying and needs no logits; they are computed only when they are read."""
    model, ids = tiny_model(attention_dropout=0.0, **shape), tiny_ids(24).view(2, 12)
    for dropout in (each for each in model.modules() if isinstance(each, torch.nn.Dropout)):
        dropout.p = 0.0
    mask, labels = torch.ones_like(ids), ids.where(ids % 3 > 0, -100)
    mask[0, :4] = 0  # padding before a text must cause no NaN
    labels[0, :4] = -100
    given, gradients = {"input_ids": ids, "attention_mask": mask}, []
    for training, trains_table in ((True, False), (True, True), (False, False)):
        model.train(training).zero_grad()
        model.model.wte.requires_grad_(trains_table)
        logits = model(**given).logits
        count = (labels[:, 1:] != -100).sum() if items is None else items
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        found = model(**given, labels=labels, num_items_in_batch=items)
        torch.testing.assert_close(found.loss, total / count)
        torch.testing.assert_close(found.logits, logits)
        assert CACHE_NAME not in found
        found.loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(**given, shift_labels=shifted).loss, total / (shifted != -100).sum())
    assert len(gradients[0]) > 5
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@torch.no_grad()
@each_model
def test_autocast_rounds_what_is_computed_from_contexts_and_not_the_contexts(shape):
    """Trainers in bf16 use autocast. If contexts were rounded at every step, they would drift."""
    model, ids = tiny_model(**shape).eval(), tiny_ids(20)[None]
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids)
    assert torch.equal(found[CACHE_NAME].contexts, exact[CACHE_NAME].contexts)
    torch.testing.assert_close(found.logits.float(), exact.logits, rtol=0.05, atol=0.3)


@torch.no_grad()
@each_model
def test_hidden_states_and_attentions_equal_those_of_phase_2(shape, monkeypatch):
    """Users may request these outputs with an argument, in the configuration, or from `generate`."""
    monkeypatch.setattr("ctxkv_lib.method.modeling.ATTENDED_AT_ONCE", 6)  # in several chunks
    model, ids = tiny_model(**shape).eval(), tiny_ids(18).view(2, 9)
    wanted = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    made = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, **wanted)
    assert [made.hidden_states[1][-1].shape, made.attentions[1][0].shape] == [(2, 1, 24), (2, 3, 1, 4)]
    asked = model(ids, output_hidden_states=True, output_attentions=True)
    vars(model.config).update(output_hidden_states=True, _output_attentions=True)
    configured = model(ids)
    outputs = [(output.hidden_states, output.attentions) for output in (asked, configured)]
    for (embeddings, hidden), (weights,) in (*outputs, (made.hidden_states[0], made.attentions[0])):
        torch.testing.assert_close(embeddings, model.model.embed(ids))
        for text, tokens in enumerate(ids):
            cache = exact_cache(model.model, tokens)
            expected_hidden, expected_weights = model.model.read(
                model.model.batch(cache, torch.arange(len(tokens)))
            )
            torch.testing.assert_close(hidden[text], expected_hidden, atol=1e-4, rtol=0)
            torch.testing.assert_close(weights[text].transpose(0, 1), expected_weights, atol=1e-4, rtol=0)


@each_model
def test_returned_embeddings_get_the_whole_gradient_of_the_logits(shape, monkeypatch):
    """Gradients flow through contexts, too; they must match finite differences in a random direction."""
    model, ids = tiny_model(**shape).eval().double(), tiny_ids(9)[None]
    output = model(ids, output_hidden_states=True)
    (gradient,) = torch.autograd.grad(output.logits[0, -1, 0], output.hidden_states[0])
    embeddings, step = model.model.embed(ids), 1e-3 * torch.randn(1, 9, 24, dtype=torch.float64)
    ends = []
    for moved in (embeddings + step, embeddings - step):
        monkeypatch.setattr(model.model, "embed", lambda _, moved=moved: moved)
        ends.append(model(ids).logits[0, -1, 0].item())
    assert (ends[0] - ends[1]) / 2 == pytest.approx((gradient * step).sum().item(), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("count", [230, 211, 100])
def test_a_resized_table_computes_the_same_for_tokens_that_stay(tmp_path, count):
    model, ids = tiny_model(has_unigram=True).eval(), tiny_ids(9)[None] % 100
    model.model.log_unigram.normal_()
    kept, before, unigram = min(count, 211), model(ids).logits, model.model.log_unigram.clone()
    model.resize_token_embeddings(count)
    resized = model(ids).logits
    torch.testing.assert_close(resized[..., :kept], before[..., :kept])
    torch.testing.assert_close(model.model.log_unigram[kept:], unigram.mean().expand(count - kept))
    assert resized.shape[-1] == count == model.config.vocab_size
    assert not model.get_input_embeddings().weight.requires_grad
    model.save_pretrained(tmp_path)
    saved = ContextKVForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(saved(ids).logits, resized)  # not bitwise: memory is aligned differently


@torch.no_grad()
@pytest.mark.slow
def test_one_graph_per_shape_holds_the_whole_forward_pass():
    model = tiny_model(**MODELS["copies"]).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for batch, length in ((1, 3), (2, 2), (3, 4)):
        ids = tiny_ids(batch * length).view(batch, length)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


ONE = tiny_ids(6)[None]
REFUSED = {
    "packed": (
        lambda m: m(ONE, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]])),
        "position_ids is 'restarted'; allowed: .*packed texts must be separate rows",
    ),
    "other_batch": (lambda m: m(ONE.expand(2, 6), **{CACHE_NAME: m(ONE)[CACHE_NAME]}), "is 1; allowed: 2"),
    "no_weights": (
        lambda _: ContextKVForCausalLM.of(tiny_method(layer=NearestTwo))(ONE, output_attentions=True),
        "output_attentions is True; allowed: False, as this layer returns none",
    ),
    "on_the_disk": (lambda m: reloaded(m, device_map={"": "disk"}), "device_map"),
    "tuple": (lambda m: m(ONE, **{CACHE_NAME: filled()}), "is 'DynamicCache'; allowed: .*ContextCache"),
}


def reloaded(model, **options):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return ContextKVForCausalLM.from_pretrained(folder, offload_folder=f"{folder}/offloaded", **options)


def filled():
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2), 0)
    return cache


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_contradicts_itself_is_refused(name):
    call, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        call(tiny_model().eval())
