"""What is trained is what is served: one model, however its tokens come in."""

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxkv_lib.hf.cache import ContextCache
from ctxkv_lib.hf.modeling import CACHE_NAME
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.contexts import exact_contexts

WINDOWS = [("current", "uniform"), ("grid", "uniform"), ("current", "geometric")]
METHODS = [(anchor, kv) for anchor in ("current", "grid") for kv in ("fixed", "variable")]
each_method = pytest.mark.parametrize(("anchor", "kv_method"), METHODS)


def read_in_chunks(model, ids, cuts, mask=None):
    """Logits of `ids` `[batch, length]` when its columns come in pieces that end at `cuts`."""
    cache, logits = None, []
    mask = torch.ones_like(ids) if mask is None else mask
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **{CACHE_NAME: cache})
        cache = out[CACHE_NAME]
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


def phase2_logits(model, ids):
    """Logits of one stream as Phase 2 computes them, from a cache of exact contexts."""
    distinct, tokens = ids.unique(return_inverse=True)
    half = model.context_block.project_tokens(model.embed(distinct))
    contexts, _ = exact_contexts(model.context_block, half, tokens, tolerance=1e-6)
    cache = StreamCache(torch.cat([ids, ids[:1]]).int(), contexts)
    return model.logits(cache.attend(model, torch.arange(len(ids)))[0], ids)


@torch.no_grad()
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_way_of_reading_gives_the_same_logits(data):
    length = data.draw(st.integers(1, 45), "length")
    anchor, slots = data.draw(st.sampled_from(WINDOWS), "window")
    shape = {
        "anchor": anchor,
        "slots": slots,
        "kv_method": data.draw(st.sampled_from(["fixed", "variable"]), "method"),
        "interval": data.draw(st.integers(1, 7), "interval"),
        "max_contexts": data.draw(st.integers(1, 6), "max_contexts"),
    }
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1)), "cuts")) if length > 1 else []
    padding = data.draw(st.integers(0, 5), "padding")
    model = tiny_model(**shape).eval()
    ids = tiny_ids(length, seed=length)
    whole = model(ids[None]).logits[0]
    torch.testing.assert_close(phase2_logits(model, ids), whole, atol=1e-4, rtol=0)
    chunked, _ = read_in_chunks(model, ids[None], cuts)
    torch.testing.assert_close(chunked[0], whole, atol=1e-4, rtol=0)
    single, _ = read_in_chunks(model, ids[None], range(1, length))
    torch.testing.assert_close(single[0], whole, atol=1e-4, rtol=0)

    padded = torch.cat([torch.zeros(padding, dtype=torch.int64), ids])[None]
    mask = (torch.arange(padding + length) >= padding).long()[None]
    shifted, _ = read_in_chunks(model, padded, [c + padding for c in cuts], mask)
    torch.testing.assert_close(shifted[0, padding:], whole, atol=1e-4, rtol=0)


@torch.no_grad()
@each_method
def test_rows_of_a_batch_do_not_meet(anchor, kv_method):
    model = tiny_model(anchor=anchor, kv_method=kv_method).eval()
    rows = [tiny_ids(n, seed=n) for n in (5, 19, 31)]
    width = max(map(len, rows))
    batch = torch.stack([torch.cat([torch.zeros(width - len(r), dtype=torch.int64), r]) for r in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(r)).long() for r in rows])
    together, cache = read_in_chunks(model, batch, [7, 8, 20], mask)
    assert cache.lengths.tolist() == [5, 19, 31]
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found[width - len(row) :], model(row[None]).logits[0], atol=1e-4, rtol=0)


@torch.no_grad()
@each_method
def test_after_a_reset_nothing_is_left(anchor, kv_method):
    model = tiny_model(anchor=anchor, kv_method=kv_method).eval()
    first, second = tiny_ids(25, seed=1)[None], tiny_ids(25, seed=2)[None]
    cache = model(first, use_cache=True)[CACHE_NAME]
    cache.reset()
    again = model(second, **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(again, model(second).logits)


@torch.no_grad()
@each_method
@pytest.mark.parametrize("changed", [0, 1, 13, 29])
def test_no_way_of_reading_sees_the_future(anchor, kv_method, changed):
    model = tiny_model(anchor=anchor, kv_method=kv_method).eval()
    ids = tiny_ids(30)
    other = ids.clone()
    other[changed] = (other[changed] + 1) % TINY["vocab_size"]
    ways = (
        lambda x: model(x[None]).logits[0],
        lambda x: read_in_chunks(model, x[None], [4, 5, 17])[0][0],
        lambda x: phase2_logits(model, x),
    )
    for way in ways:
        before, after = way(ids), way(other)
        torch.testing.assert_close(before[:changed], after[:changed], atol=1e-5, rtol=0)
        assert (before[changed:] - after[changed:]).abs().max() > 1e-2


def greedy(model, prompt, count):
    """Token by token with no cache at all."""
    ids = prompt
    for _ in range(count):
        ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    return ids


@torch.no_grad()
@each_method
def test_generate_equals_reading_everything_again(anchor, kv_method):
    model = tiny_model(anchor=anchor, kv_method=kv_method).eval()
    prompts = [tiny_ids(4, seed=4), tiny_ids(15, seed=15)]
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for prompt, wanted in zip(prompts, expected, strict=True):
        assert model.generate(prompt[None], **options)[0].tolist() == wanted.tolist()
        assert model.generate(prompt[None], use_cache=False, **options)[0].tolist() == wanted.tolist()
    batch = torch.stack([torch.cat([torch.zeros(11, dtype=torch.int64), prompts[0]]), prompts[1]])
    mask = torch.stack([(torch.arange(15) >= 11).long(), torch.ones(15, dtype=torch.int64)])
    found = model.generate(batch, attention_mask=mask, **options)
    assert found[0, 11:].tolist() == expected[0].tolist()
    assert found[1].tolist() == expected[1].tolist()


@torch.no_grad()
@each_method
def test_beam_search_equals_its_uncached_self(anchor, kv_method):
    model = tiny_model(anchor=anchor, kv_method=kv_method).eval()
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    prompt = tiny_ids(9)[None]
    with_cache = model.generate(prompt, **options)
    assert with_cache.tolist() == model.generate(prompt, use_cache=False, **options).tolist()


@torch.no_grad()
def test_generate_goes_on_from_a_cache():
    model = tiny_model().eval()
    prompt = tiny_ids(20)
    cache = model(prompt[None, :13], use_cache=True)[CACHE_NAME]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(prompt[None], **{CACHE_NAME: cache}, **options)
    assert found[0].tolist() == greedy(model, prompt, 8).tolist()


@torch.no_grad()
def test_sampling_follows_the_seed():
    model, prompt = tiny_model().eval(), tiny_ids(6)[None]
    options = {"max_new_tokens": 15, "do_sample": True, "temperature": 20.0, "top_k": 20, "pad_token_id": 0}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(prompt, **options).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@torch.no_grad()
@pytest.mark.parametrize(("anchor", "kept"), [("current", 621), ("grid", 32)])
def test_memory_of_a_stream_is_constant(anchor, kept):
    model = tiny_model(anchor=anchor, interval=20, max_contexts=32).eval()
    cache = ContextCache(model.config, 1, model.wte.weight)
    seen = set()
    for _ in range(5):
        model(tiny_ids(300)[None], **{CACHE_NAME: cache})
        seen.add(cache.nbytes)
    assert seen == {kept * TINY["context_dim"] * 4 + 8}
    with pytest.raises(NotImplementedError, match="cannot be unread"):
        cache.crop(1)


def test_attentions_and_kept_logits_are_honoured():
    model, ids = tiny_model(kv_method="variable").eval(), tiny_ids(12).view(2, 6)
    out = model(ids, output_attentions=True, logits_to_keep=1)
    (weights,) = out.attentions
    assert weights.shape == (2, TINY["num_heads"], 6, TINY["max_contexts"])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, TINY["num_heads"], 6))
    assert weights[:, :, 0, 1:].eq(0).all()  # position 0 has one context
    assert out.logits.shape == (2, 1, TINY["vocab_size"])
    assert model(ids).attentions is None


def test_ignored_labels_do_not_count():
    model, ids = tiny_model().eval(), tiny_ids(10)[None]
    labels = ids.clone()
    labels[0, 6:] = -100
    expected = model(ids[:, :6], labels=ids[:, :6]).loss
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
