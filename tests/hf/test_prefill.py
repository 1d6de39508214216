"""Long texts are read in lock-step, and the loss needs no logits: the plain outputs and gradients."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_ids, tiny_model
from ctxkv_lib.hf import modeling, prefill
from hypothesis import given, settings
from hypothesis import strategies as st
from test_context_cache import read_in_chunks

from ctxkv_lib.method import contexts


def exact_model(std=0.1, **shape):
    """In float64, where rounding errors stay small although random init amplifies them fifty times."""
    model = tiny_model(**shape).double()
    with torch.no_grad():
        model.context_block.linear.weight.mul_(std / 0.1)
    return model.eval()


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_lock_step_is_the_plain_loop(data):
    batch, length = data.draw(st.integers(1, 4), "batch"), data.draw(st.integers(1, 120), "length")
    model = exact_model(data.draw(st.sampled_from([0.1, 0.01]), "std"))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3), "cuts")) if length > 1 else []
    ids = tiny_ids(batch * length, seed=length).view(batch, length)
    columns = torch.arange(length)
    mask = {
        "none": torch.ones(batch, length),
        "left": columns >= torch.randint(0, length + 1, (batch, 1)),
        "right": columns < torch.randint(0, length + 1, (batch, 1)),
        "any": torch.rand(batch, length) < 0.5,
    }[data.draw(st.sampled_from(["none", "left", "right", "any"]), "padding")].long()
    plain, plain_cache = read_in_chunks(model, ids, cuts, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "LONG", 1)
        patch.setattr(modeling, "TOLERANCE", 1e-10)
        patch.setattr(contexts, "SEGMENT", data.draw(st.integers(2, 30), "SEGMENT"))
        patch.setattr(contexts, "CHECK_EVERY", data.draw(st.integers(1, 30), "CHECK_EVERY"))
        fast, cache = read_in_chunks(model, ids, cuts, mask)
    torch.testing.assert_close(fast, plain, atol=1e-7, rtol=0)
    torch.testing.assert_close(cache.state, plain_cache.state, atol=1e-8, rtol=0)
    torch.testing.assert_close(cache.stored, plain_cache.stored, atol=1e-8, rtol=0)
    assert torch.equal(cache.lengths, plain_cache.lengths)


@torch.no_grad()
def test_long_texts_keep_the_promise_as_they_come(monkeypatch):
    model, ids = tiny_model(context_dim=64, hidden_size=96).eval(), tiny_ids(1400).view(2, 700)
    fast = model(ids).logits
    monkeypatch.setattr(modeling, "LONG", 10_000)
    torch.testing.assert_close(fast, model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("phase", [1, 2])
def test_gradients_are_those_of_the_plain_loop(monkeypatch, phase):
    """The scan has no gradient, so it must not read a block that is trained."""
    ids = tiny_ids(180).view(2, 90)
    results, scans = [], []
    monkeypatch.setattr(modeling, "scan_rows", lambda *a: scans.append(1) or prefill.scan_rows(*a))
    for long in (1, 10_000):
        monkeypatch.setattr(modeling, "LONG", long)
        monkeypatch.setattr(contexts, "SEGMENT", 16)
        model = exact_model()
        model.set_phase(phase)
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (fast, fast_gradients), (plain, plain_gradients) = results
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)
    assert any(gradient.abs().max() > 1e-3 for gradient in plain_gradients.values())
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, atol=1e-4, rtol=0, msg=name)
    assert len(scans) == phase - 1


@pytest.mark.parametrize("trained_table", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 7}, {"ignore_index": -1}])
def test_the_loss_is_that_of_full_logits(trained_table, options):
    model, ids = exact_model(), tiny_ids(60).view(3, 20)
    model.wte.weight.requires_grad_(trained_table)
    labels = ids.clone()
    labels[0, :12] = options.get("ignore_index", -100)
    out = model(ids, labels=labels, logits_to_keep=0, **options)
    found = out.loss
    expected = model.loss_function(out.logits.double(), labels, vocab_size=TINY["vocab_size"], **options)
    torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-6, rtol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    pairs = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in (found, expected)]
    for fast, plain in zip(*pairs, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)


def test_labels_may_come_shifted():
    model, ids = exact_model(), tiny_ids(20)[None]
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:]
    whole = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted).loss, whole)


def test_training_with_labels_makes_no_logits_unless_asked(monkeypatch):
    model, ids = tiny_model(attention_dropout=0.0).train(), tiny_ids(20)[None]
    expected = model(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", None)
        out = model(ids, labels=ids)
        assert out.logits is None
        assert len(out.to_tuple()) == 1
    torch.testing.assert_close(model(ids, labels=ids, logits_to_keep=0).logits, expected)
    torch.testing.assert_close(model(ids, labels=ids, logits_to_keep=2).logits, expected[:, -2:])
    torch.testing.assert_close(model.eval()(ids, labels=ids).logits, expected)
    for columns, labels in product(([4, 0, 5], []), (None, ids)):
        kept = model(ids, labels=labels, logits_to_keep=torch.tensor(columns, dtype=torch.int64))
        torch.testing.assert_close(kept.logits, expected[:, columns])


@torch.no_grad()
def test_only_what_is_kept_is_attended(monkeypatch):
    model, ids = tiny_model().eval(), tiny_ids(30).view(2, 15)
    attended, whole = [], model(ids).logits
    attend = model.attend
    monkeypatch.setattr(model, "attend", lambda x, *rest: attended.append(len(x)) or attend(x, *rest))
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
    assert attended == [2]
