"""Whole runs on a GPU: the numbers of a CPU, wherever caches lie, whatever stops or fills it."""

import gc
import sys

import pytest
import torch

from ctxkv_lib.errors import Stopped, UserError
from ctxkv_lib.measure.measure import MAKERS, measure
from ctxkv_lib.method import oacd, phase2
from ctxkv_lib.runs import caches, long_run, scratch, trained
from ctxkv_lib.runs.trained import generate_text


def epochs(finished):
    shown = ("train_ppl", "val_ppl", "val_acc")
    return [[epoch[name] for name in shown] for epoch in finished.summary["phase2"]["epochs"]]


@pytest.mark.parametrize("recipe", ["published", "exact", "tuned"])
def test_a_recipe_ends_where_it_does_on_a_cpu(train_on, recipe):
    """Random numbers differ, so the PPL does, too."""
    found, expected = (train_on.once(device=device, recipe=recipe).summary for device in ("cuda", "cpu"))
    assert found["phase2"]["val_ppl"] == pytest.approx(expected["phase2"]["val_ppl"], rel=0.1)
    assert found["parameters"] == expected["parameters"]
    assert "on cuda" in found["provenance"]["caches"]
    assert all(stage["gpu_peak_gib"] >= stage["gpu_gib"] >= 0 for stage in found["memory"])


def test_caches_train_the_same_wherever_they_lie(train_on, monkeypatch):
    placed = train_on.once(device="cuda", recipe="exact")
    monkeypatch.setattr(caches, "free_bytes", lambda device: 0)
    monkeypatch.setattr(caches, "if_it_fits", lambda *_: None)
    mapped = train_on(name="mapped")
    assert "on cuda" in placed.summary["provenance"]["caches"]
    assert "mapped from its files, read ahead" in mapped.summary["provenance"]["caches"]
    assert epochs(mapped) == epochs(placed)


def test_contexts_that_are_computed_when_needed_train_too(train_on):
    streamed = train_on(name="streamed", runtime__context_cache="streamed", phase1__max_tokens=200)
    assert "computed when needed" in streamed.summary["provenance"]["caches"]
    assert streamed.summary["phase2"]["val_ppl"] == pytest.approx(
        train_on.once(device="cpu", recipe="exact").summary["phase2"]["val_ppl"], rel=0.1
    )


def test_phase_1_goes_on_where_contexts_do_not_fit(train_on, monkeypatch):
    free = scratch.free_bytes
    monkeypatch.setattr(scratch, "free_bytes", lambda device: free(device) if device.type == "cpu" else 0)
    found, expected = train_on(name="mapped"), train_on.once(device="cpu", recipe="exact")
    assert found.summary["phase1"]["convergence_rate"] == pytest.approx(
        expected.summary["phase1"]["convergence_rate"], abs=0.1
    )


@pytest.mark.parametrize(("module", "name"), [(long_run, "in_micro_batches"), (phase2, "batch_gradients")])
def test_when_memory_is_full_micro_batches_give_the_same_numbers(train_on, monkeypatch, module, name, said):
    expected = train_on.once(runtime__precision="fp32")
    whole, sizes = getattr(module, name), []

    def limited(*args):
        rows = len(args[-1]) if module is phase2 else len(args[1][0]) / args[2]
        sizes.append(rows)
        if rows > sizes[0] / 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(*args)

    monkeypatch.setattr(module, name, limited)
    found = train_on(name="cut", runtime__precision="fp32")
    assert any("goes on in micro-batches" in line for line in said)
    for one, other in zip(epochs(found), epochs(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("recipe", "hook"), [("tuned", "after_step"), ("published", "after_round")])
def test_a_stopped_run_goes_on_to_the_same_numbers(train_on, saved_at_every_step, monkeypatch, recipe, hook):
    expected = train_on.once(device="cuda", recipe=recipe)
    original, calls = getattr(long_run.LongRun, hook), []

    def stops(self, *args):
        original(self, *args)
        calls.append(args)
        if len(calls) == 2:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(long_run.LongRun, hook, stops)
        with pytest.raises(Interrupted):
            train_on(recipe=recipe, name="stopped")
    assert epochs(train_on(recipe=recipe, name="stopped")) == epochs(expected)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_error_that_is_kept_keeps_no_memory(train_on, card, monkeypatch, raised):
    """As IPython keeps `sys.last_value`."""

    def fails(*_):
        raise raised("CUDA out of memory.")

    gc.collect()
    before = card.live
    monkeypatch.setattr(phase2, "batch_gradients", fails)
    with pytest.raises((Stopped, UserError)) as kept:
        train_on()
    assert kept.value.__traceback__ is not None
    gc.collect()
    assert card.live - before < 2**16
    assert sys.exc_info() == (None, None, None)


@pytest.mark.parametrize(
    "use", [lambda made: measure(made, ["probe"]), lambda made: generate_text(made, "a")]
)
def test_an_error_in_the_use_of_a_run_keeps_no_memory(train_on, card, monkeypatch, use):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    made = train_on()
    gc.collect()
    before = card.live
    monkeypatch.setitem(MAKERS, "probe", fails)
    monkeypatch.setattr(trained, "_generated", fails)
    with pytest.raises(UserError, match="ran out of memory") as kept:
        use(made)
    assert kept.value.__traceback__ is not None
    gc.collect()
    assert card.live - before < 2**16


def test_a_run_of_a_gpu_is_measured_without_one(train_on, monkeypatch, capsys):
    made = train_on()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "probe" in measure(made, ["probe"]).summary
    assert "The run is of cuda, which this machine lacks; cpu is used." in capsys.readouterr().err


def test_a_run_that_finds_no_memory_says_what_to_do(train_on, card):
    card.total = 2**20
    with pytest.raises(UserError, match="memory"):
        train_on()


def test_fp32_is_not_tf32(train_on):
    libraries = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for library in libraries:
        library.allow_tf32 = True
    kinds = [
        getattr(torch.backends.cudnn, kind) for kind in ("conv", "rnn") if hasattr(torch.backends.cudnn, kind)
    ]
    if kinds:
        torch.backends.cudnn.fp32_precision = "tf32"
    torch.set_float32_matmul_precision("high")
    train_on(phase2__max_epochs=1)
    assert not any(library.allow_tf32 for library in libraries)
    assert torch.get_float32_matmul_precision() == "highest"
    assert all(kind.fp32_precision == "ieee" for kind in kinds)


class EndsInProduct(torch.nn.Module):
    """Attention whose hidden states are bf16 in training on a GPU, and whose init has no bf16 form."""

    def __init__(self, config):
        super().__init__()
        self.inner = torch.nn.Linear(config.context_dim, config.hidden_size)

    def init_from_block(self, block):
        torch.linalg.svd(self.inner.weight @ self.inner.weight.T)

    def forward(self, embeddings, window, present):
        return self.inner(window.mean(dim=1))


class MixesTypes(EndsInProduct):
    def forward(self, embeddings, window, present):
        return torch.lerp(embeddings, super().forward(embeddings, window, present), 0.5)


def test_losses_are_fp32_whatever_attention_returns(train_on, monkeypatch):
    original, kinds = phase2.batch_gradients, set()

    def noted(*args):
        loss = original(*args)
        kinds.add(loss.dtype)
        return loss

    monkeypatch.setattr(phase2, "batch_gradients", noted)
    train_on(name="product", attention=f"{__name__}:EndsInProduct", runtime__precision="bf16")
    assert kinds == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention": f"{__name__}:MixesTypes", "runtime__precision": "bf16"}, "fails on 2 positions"),
    ],
)
def test_what_fails_on_a_gpu_alone_is_refused_before_training(train_on, monkeypatch, changes, reason):
    monkeypatch.setattr(oacd, "train_iteration", None)
    with pytest.raises(UserError, match=reason):
        train_on(name="refused", **changes)
