"""What is trained is what is served: one model, however its tokens come in."""

import pytest
import torch
from conftest import TINY, NearestTwo, tiny_ids, tiny_model
from ctxkv_lib.hf.copying_streams import as_served
from ctxkv_lib.hf.modeling import CACHE_NAME
from ctxkv_lib.hf.plugins import NAMED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.contexts import distinct_rows, exact_contexts
from ctxkv_lib.method.model import project_inputs

METHODS = ["fixed", "variable"]
each_method = pytest.mark.parametrize("kv_method", METHODS)


def read_in_chunks(model, ids, cuts, mask=None):
    """Logits of `ids` `[batch, length]` whose columns come in chunks that end at `cuts`, and the cache."""
    cache, logits = None, []
    mask = torch.ones_like(ids) if mask is None else mask
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **{CACHE_NAME: cache})
        cache = out[CACHE_NAME]
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


def left_padded(rows):
    """A batch `[rows, longest]` and its mask."""
    width = max(map(len, rows))
    batch = torch.stack([torch.cat([torch.zeros(width - len(row)).long(), row]) for row in rows])
    return batch, torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])


def phase2_logits(model, ids):
    """Logits of one stream as Phase 2 computes them, from a cache of exact contexts."""
    embeddings, tokens = distinct_rows(model, ids)
    inputs = project_inputs(model.context_block, embeddings)
    contexts, _ = exact_contexts(model.context_block, inputs, tokens, tolerance=1e-6)
    cache = as_served(model, StreamCache(torch.cat([ids, ids[:1]]).int(), contexts))
    return cache.gather(torch.arange(len(ids)), model.window).logits(model)


def copying(weight, sharpness=5.0):
    """The tiny model's plug-ins with attention that copies."""
    own = {"copy_weight": weight, "copy_sharpness": sharpness}
    return {"attention": {"plugin": "ctxkv_lib.method.tuned:SlotAttention", "settings": own}}


@torch.no_grad()
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_way_of_reading_gives_the_same_logits(data):
    length = data.draw(st.integers(1, 45), "length")
    kv_method = data.draw(st.sampled_from(METHODS), "method")
    interval, slots = data.draw(st.integers(1, 7), "interval"), data.draw(st.integers(1, 6), "max_contexts")
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1)), "cuts")) if length > 1 else []
    padding = data.draw(st.integers(0, 5), "padding")
    copies = data.draw(st.booleans(), "copies")
    shape = {"kv_method": kv_method, "interval": interval, "max_contexts": slots}
    shape |= {"plugins": copying(0.4)} if copies else {}
    model = tiny_model(**shape).eval()
    ids = tiny_ids(length, seed=length)
    whole = model(ids[None]).logits[0]
    other = tiny_ids(length + padding, seed=1)
    padded, mask = left_padded([ids, other])
    together, cache = read_in_chunks(model, padded, [cut + padding for cut in cuts], mask)
    assert cache.lengths.tolist() == [length, length + padding]
    torch.testing.assert_close(together[1], model(other[None]).logits[0], atol=1e-4, rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0
    found = (
        model(padded, attention_mask=mask, **{CACHE_NAME: cache}).logits[0, padding:],
        phase2_logits(model, ids),
        read_in_chunks(model, ids[None], cuts)[0][0],
        read_in_chunks(model, ids[None], range(1, length))[0][0],  # of which none can see the future
        together[0, padding:],
    )
    for logits in found:
        torch.testing.assert_close(logits, whole, atol=1e-4, rtol=0)


@each_method
def test_padding_before_a_text_leaves_loss_and_gradients_finite(kv_method):
    model = tiny_model(kv_method=kv_method).train()
    ids, mask = left_padded([tiny_ids(9), tiny_ids(4)])
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    found = [out.loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)]
    assert len(found) > 5
    assert all(each.isfinite().all() for each in found)


@torch.no_grad()
def test_a_users_attention_is_served_as_it_is_trained(monkeypatch):
    monkeypatch.setitem(NAMED, "mine:NearestTwo", NearestTwo)
    plugins = {"attention": {"plugin": "mine:NearestTwo", "settings": {}}}
    model, ids = tiny_model(plugins=plugins).eval(), tiny_ids(12)
    whole = model(ids[None], output_attentions=True)
    assert whole.attentions is None
    torch.testing.assert_close(phase2_logits(model, ids), whole.logits[0], atol=1e-4, rtol=0)
    cut, _ = read_in_chunks(model, ids[None], [1, 5])
    torch.testing.assert_close(cut, whole.logits, atol=1e-4, rtol=0)


def greedy(model, prompt, count):
    """Token by token with no cache at all."""
    ids = prompt
    for _ in range(count):
        ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    return ids


@torch.no_grad()
@pytest.mark.parametrize(
    ("kv_method", "plugins"),
    [("fixed", {}), ("variable", {}), ("fixed", copying(0.9))],
)
def test_generate_equals_reading_everything_again_and_beam_search_its_uncached_self(kv_method, plugins):
    model = tiny_model(kv_method=kv_method, plugins=plugins).eval()
    prompts = [tiny_ids(4, seed=4), tiny_ids(15, seed=15)]
    expected = [greedy(model, prompt, 12).tolist() for prompt in prompts]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for prompt, wanted in zip(prompts, expected, strict=True):
        assert model.generate(prompt[None], **options)[0].tolist() == wanted
        assert model.generate(prompt[None], use_cache=False, **options)[0].tolist() == wanted
    batch, mask = left_padded(prompts)
    found = model.generate(batch, attention_mask=mask, **options)
    assert [found[0, 11:].tolist(), found[1].tolist()] == expected
    options |= {"num_beams": 3, "num_return_sequences": 3}  # also of lower beams, which change places
    options |= {"return_dict_in_generate": True, "output_scores": True}
    searched, plain = (
        model.generate(tiny_ids(9)[None], use_cache=cached, **options) for cached in (True, False)
    )
    assert searched.sequences.tolist() == plain.sequences.tolist()
    torch.testing.assert_close(searched.sequences_scores, plain.sequences_scores)


def test_generate_gives_attentions():
    model, ids = tiny_model().eval(), tiny_ids(12).view(2, 6)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    made = model.generate(ids, output_attentions=True, **options)
    whole = model(made.sequences[:, :-1], output_attentions=True).attentions[0]
    steps = torch.cat([weights for (weights,) in made.attentions], dim=2)
    torch.testing.assert_close(steps, whole)
    assert model.generate(ids, **options).attentions is None


@torch.no_grad()
@pytest.mark.parametrize("plugins", [{}, copying(0.4)])
def test_a_repeated_cache_goes_on_as_the_repeated_texts(plugins):
    model = tiny_model(plugins=plugins).eval()
    ids, new = tiny_ids(18).view(2, 9), tiny_ids(4, seed=1)[:, None]
    cache = model(ids, use_cache=True)[CACHE_NAME]
    cache.batch_repeat_interleave(2)
    found = model(new, **{CACHE_NAME: cache}).logits[:, -1]
    whole = model(torch.cat([ids.repeat_interleave(2, dim=0), new], dim=1)).logits[:, -1]
    torch.testing.assert_close(found, whole)
    assert cache.get_max_length() == cache.get_max_cache_shape() == -1


@torch.no_grad()
def test_what_is_kept_or_counted_gets_its_own_copies():
    model, ids = tiny_model(plugins=copying(0.4)).eval(), tiny_ids(24).view(2, 12)
    whole, some = model(ids), torch.tensor([3, 7])
    torch.testing.assert_close(model(ids, logits_to_keep=some).logits, whole.logits[:, some])
    labels = ids.where(ids % 3 > 0, -100)
    found = model(ids, labels=labels, logits_to_keep=some)
    expected = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.logits, whole.logits[:, some])


@torch.no_grad()
def test_copies_are_compared_in_full_precision_under_autocast():
    model, ids = tiny_model(plugins=copying(0.9)).eval(), tiny_ids(24).view(2, 12)
    expected = model(ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, labels=ids)
    torch.testing.assert_close(found.logits.float(), expected.logits, rtol=0.02, atol=0.05)
    torch.testing.assert_close(found.loss.float(), expected.loss, rtol=0.02, atol=0)


@torch.no_grad()
def test_a_cache_without_tokens_is_refused_by_a_model_that_copies():
    model, ids = tiny_model().eval(), tiny_ids(12)[None]
    cache = model(ids, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="without tokens'; allowed: one of a model that copies"):
        tiny_model(plugins=copying(0.4)).eval()(ids, **{CACHE_NAME: cache})


def test_a_model_in_training_copies_nothing():
    ids, losses = tiny_ids(24).view(2, 12), []
    for weight in (0.4, 0.0):
        model = tiny_model(plugins=copying(weight)).train()
        torch.manual_seed(0)
        losses.append(model(ids, labels=ids).loss)
    torch.testing.assert_close(*losses)


@torch.no_grad()
def test_memory_of_a_stream_is_constant():
    model = tiny_model(interval=20, max_contexts=32).eval()
    cache, seen = None, set()
    for _ in range(5):
        cache = model(tiny_ids(300)[None], use_cache=True, **{CACHE_NAME: cache})[CACHE_NAME]
        seen.add(cache.nbytes)
    assert seen == {621 * TINY["context_dim"] * 4 + 8}
    assert not cache.is_croppable  # which transformers asks before it stops a step late, on mps
    with pytest.raises(NotImplementedError, match="cannot be unread"):
        cache.crop(1)
