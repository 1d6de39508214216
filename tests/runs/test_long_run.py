"""Trainings that are stopped, find their saved states torn, or run out of memory give the same numbers."""

import itertools
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, cloned, tiny_ids, tiny_method, tiny_stream

from ctxkv_lib.method import oacd, phase2
from ctxkv_lib.method.config import Phase1Config, Phase2Config
from ctxkv_lib.method.contexts import distinct_rows
from ctxkv_lib.method.model import ContextBlock
from ctxkv_lib.method.oacd import train_context_block
from ctxkv_lib.method.phase2 import train_attention
from ctxkv_lib.runs import long_run, scratch
from ctxkv_lib.runs.long_run import Checkpoint, LongRun
from ctxkv_lib.runs.micro_batches import summed

CPU = torch.device("cpu")
EPOCH_STEPS = 8  # of 499 positions


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds are calls of the clock: as many in a training that was resumed."""
    monkeypatch.setattr(time, "perf_counter", partial(next, itertools.count()))


TRAIN, VAL = tiny_stream(499), tiny_stream(119)


class Shifted(ContextBlock):
    """Has a buffer that its init fills."""

    def __init__(self, context_dim, hidden_size):
        super().__init__(context_dim, hidden_size)
        self.register_buffer("mean", torch.zeros(hidden_size))

    def init_weights(self, embeddings, tokens, config):
        super().init_weights(embeddings, tokens, config)
        self.mean.copy_(embeddings[tokens].mean(dim=0) + 1)

    def project_inputs(self, embeddings):
        return super().project_inputs(embeddings - self.mean)


def run_phase1(loop, folder=None, block=None, **changes):
    """Result without seconds, and all tensors that Phase 1 leaves; contexts in a mapped file in `folder`."""
    model = tiny_method()
    if block:
        model.context_block = block(TINY["context_dim"], TINY["hidden_size"])
    model.set_phase(1)
    shape = (401, TINY["context_dim"])
    contexts = scratch.scratch(shape, torch.float32, CPU, folder, spare_memory=bool(folder))
    generator = torch.Generator().manual_seed(2)
    config = Phase1Config(max_iterations=8, batch_size=150, **changes)
    rows = distinct_rows(model, tiny_ids(400))
    result = train_context_block(model.context_block, *rows, config, contexts, generator, None, loop)
    tensors = {**cloned(model), "contexts": contexts, "draws": generator.get_state()}
    assert result.seconds == result.iterations - 1
    return (result.iterations, result.convergence_rate, result.stop_reason), tensors


def run_phase2(loop, optimizer="adamw"):
    model = tiny_method(attention_dropout=0.3)
    config = Phase2Config(max_epochs=4, batch_size=64, patience=4, optimizer=optimizer)
    result = train_attention(model, TRAIN, VAL, config, 1, loop)
    return result.stop_reason, cloned(model)


class Counted(LongRun):
    """Also checks that a loop takes as many steps as its bar expects."""

    def track(self, items, description, total, done=0):
        items = list(items)
        assert len(items) == total - done
        return super().track(items, description, total, done)


def hooks(path=None, key="key", stop_at=None):
    """Hooks of a long run, and the metrics they hear; they stop as they hear the metric of that number."""
    heard = []

    def listener(metric):
        heard.append({name: value for name, value in metric.items() if name != "memory"})
        if len(heard) == stop_at:
            raise Stopped

    return Counted("Phase X", CPU, listener, path and Checkpoint(path, key)), heard


def assert_same(found, expected):
    assert found[0] == expected[0]
    for name, tensor in expected[1].items():
        assert torch.equal(found[1][name], tensor), name


def stopped_and_resumed(train, path, stop_at):
    """Compare a training that was stopped at a metric with one that was not; return its metrics."""
    whole, expected = hooks()
    uninterrupted = train(whole)
    with pytest.raises(Stopped):
        train(hooks(path, stop_at=stop_at)[0])
    loop, heard = hooks(path)
    assert_same(train(loop), uninterrupted)
    assert heard == expected
    return heard


PLATEAU = {"convergence_threshold": 1.0, "plateau_rate": 0.0, "plateau_gain": 1.0, "plateau_patience": 6}


@pytest.mark.parametrize("changes", [{}, PLATEAU])
@pytest.mark.parametrize("stop_at", [1, 2, 6])
def test_phase_1_stopped_and_resumed_gives_the_same_numbers(
    tmp_path, saved_at_every_step, stop_at, changes, monkeypatch
):
    original, done = oacd.train_iteration, []
    monkeypatch.setattr(oacd, "train_iteration", lambda *batch: done.append(1) or original(*batch))
    train = lambda loop: run_phase1(loop, **changes)  # noqa: E731
    heard = stopped_and_resumed(train, tmp_path / "c.safetensors", stop_at)
    assert len(done) == 2 * len(heard)  # nothing was done twice


def test_buffers_that_a_blocks_init_fills_are_there_after_a_stop(tmp_path, saved_at_every_step):
    def train(loop):
        torch.manual_seed(5)
        return run_phase1(loop, block=Shifted)

    stopped_and_resumed(train, tmp_path / "c.safetensors", 3)


def test_phase_1_in_a_mapped_file_gives_the_numbers_of_memory(tmp_path, saved_at_every_step, monkeypatch):
    monkeypatch.setattr(scratch, "PART_ROWS", 150)
    path, expected = tmp_path / "c.safetensors", run_phase1(hooks()[0])
    with pytest.raises(Stopped):
        run_phase1(hooks(path, stop_at=4)[0], tmp_path)
    assert_same(run_phase1(hooks(path)[0], tmp_path), expected)


@pytest.mark.parametrize("optimizer", ["adamw", "scheduled"])
def test_phase_2_stopped_between_epochs_gives_the_same_numbers(tmp_path, optimizer):
    stopped_and_resumed(lambda loop: run_phase2(loop, optimizer), tmp_path / "c.safetensors", 2)


@pytest.mark.parametrize("stopped_at", [0, 1, 7, 8, 9, 20, 31])  # steps
@pytest.mark.parametrize("optimizer", ["adamw", "scheduled"])
def test_phase_2_stopped_within_an_epoch_repeats_one_step(
    tmp_path, saved_at_every_step, stopped_at, optimizer, monkeypatch
):
    loop, expected = hooks()
    whole, original, steps, path = run_phase2(loop, optimizer), phase2.batch_gradients, [], tmp_path / "c"

    def counted(*batch):
        steps.append(1)
        if len(steps) == stopped_at + 1:
            raise Stopped
        return original(*batch)

    monkeypatch.setattr(phase2, "batch_gradients", counted)
    with pytest.raises(Stopped):
        run_phase2(hooks(path)[0], optimizer)
    _, state = Checkpoint(path, "key").restore() or (None, {"position": 0, "seconds": 0})
    assert bool(state["seconds"]) == bool(state["position"])
    loop, heard = hooks(path)
    assert_same(run_phase2(loop, optimizer), whole)
    assert heard == expected
    assert len(steps) == 4 * EPOCH_STEPS + 1


def test_a_state_of_another_training_is_not_restored(tmp_path):
    path = tmp_path / "c.safetensors"
    run_phase2(hooks(path, key="other")[0])
    loop, heard = hooks(path)
    run_phase2(loop)
    assert [metric["epoch"] for metric in heard] == [1, 2, 3, 4]
    assert heard[0]["improved"]


@pytest.mark.parametrize("micro_batches", [1, 3, 41])
def test_micro_batches_have_the_gradients_of_the_mean_loss(micro_batches):
    """AdamW hardly minds a gradient's scale, so this looks at the gradients, and at the next draws."""
    found = []
    for whole in (True, False):
        model = tiny_method(attention_dropout=0.5).train()
        batch = tiny_stream(60).gather(torch.arange(40), model.window)
        torch.manual_seed(7)
        if whole:
            hidden, _ = batch.attend(model)
            F.cross_entropy(model.logits(hidden, batch.tokens), batch.targets).backward()
        else:
            work = partial(phase2.batch_gradients, model, model.wte.weight.detach(), 40)
            summed(work, batch, 40, slice(0, 40), micro_batches)
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        found.append({**gradients, "draws": torch.rand(3)})
    expected, cut = found
    for name, gradient in expected.items():
        torch.testing.assert_close(cut[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert {name.split(".")[0] for name, g in cut.items() if g is not None} == {
        "attention",
        "feed_forward",
        "draws",
    }


def exhausted(most, kind):
    """A hook of a module that raises where it is given more rows than memory has room for."""

    def refuse(_, given):
        if len(given[0]) > most:
            raise kind("no more")

    return refuse


@pytest.mark.parametrize("kind", [MemoryError, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize(
    ("part", "most", "train"), [("context_block", 40, run_phase1), ("attention", 20, run_phase2)]
)
def test_without_memory_for_a_batch_it_trains_in_micro_batches_to_the_same_numbers(
    part, most, train, kind, said, monkeypatch
):
    loop, whole = hooks()
    expected, original = train(loop), tiny_method

    def small(**changes):
        model = original(**changes)
        getattr(model, part).register_forward_pre_hook(exhausted(most, kind))
        return model

    monkeypatch.setitem(globals(), "tiny_method", small)
    loop, heard = hooks()
    found = train(loop)
    assert len(said) == 1
    assert "micro-batches" in said[0]
    assert found[0] == pytest.approx(expected[0]) if train is run_phase1 else found[0] == expected[0]
    for ours, theirs in zip(heard, whole, strict=True):
        numbers = {name: value for name, value in theirs.items() if not isinstance(value, str)}
        assert {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    for name, tensor in expected[1].items():
        tolerance = 3e-3 if name == "attention.k.bias" else 1e-4
        torch.testing.assert_close(found[1][name], tensor, atol=tolerance, rtol=1e-3, msg=name)


def test_a_micro_batch_that_fails_leaves_nothing_of_those_before_it(said):
    calls, weight = [], torch.nn.Parameter(torch.zeros(()))

    def work(part):
        calls.append(len(part))
        if len(calls) in (1, 3):
            raise MemoryError
        (weight * len(part)).backward()
        return torch.zeros(())

    batch = tiny_stream(60).gather(torch.arange(40), tiny_method().window)
    hooks()[0].backward(work, batch, 40, torch.optim.SGD([weight]))
    assert calls == [40, 20, 20, 10, 10, 10, 10]
    assert weight.grad == 40


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: ..."), "not enough memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "mat1 and mat2"),
    ],
)
def test_one_row_without_memory_and_any_other_error_are_raised(monkeypatch, error, match):
    attempts = []

    def fail(*arguments):
        attempts.append(arguments)
        raise error

    monkeypatch.setattr(phase2, "batch_gradients", fail)
    with pytest.raises(RuntimeError, match=match):
        run_phase2(hooks()[0])
    assert len(attempts) == (7 if "memory" in match else 1)  # 64 rows in 1, 2, 4, ... 64 micro-batches


@pytest.fixture
def kept(tmp_path):
    """A checkpoint that holds state 2, and state 1 before it."""
    kept = Checkpoint(tmp_path / "c.safetensors", "key")
    for number in (1, 2):
        kept.save({"x": torch.full((3,), float(number))}, {"number": number})
    return kept


def found(kept):
    return kept.restore() and (kept.restore()[1]["number"], kept.restore()[0]["x"][0].item())


@pytest.mark.parametrize("damage", ["torn", "gone", "empty"])
def test_the_newest_state_that_can_be_read_is_restored(kept, said, damage):
    assert found(kept) == (2, 2.0)
    if damage == "gone":
        kept.path.unlink()
    else:
        kept.path.write_bytes(kept.path.read_bytes()[: 60 if damage == "torn" else 0])
    assert found(kept) == (1, 1.0)
    assert len(said) == (damage != "gone")
    kept.save({"x": torch.full((3,), 3.0)}, {"number": 3})
    kept.path.write_bytes(b"torn again")
    assert found(kept) == (1, 1.0)  # the one that could be read was not replaced by the torn one


def test_a_state_of_many_tensors_of_any_type_is_kept(tmp_path):
    kept, kinds = Checkpoint(tmp_path / "c.safetensors", "key"), (torch.int8, torch.int16, torch.complex64)
    tensors = {
        f"adam/attention.layers.{n}.self_attn.in_proj_weight/exp_avg": torch.ones(2) for n in range(1500)
    }
    tensors |= {str(kind): torch.ones(2, dtype=kind) for kind in kinds}
    kept.save(tensors, {})
    found, _ = kept.restore()
    assert found.keys() == tensors.keys()
    assert [found[str(kind)].dtype for kind in kinds] == [*kinds]


def test_it_saves_every_half_minute_and_less_often_where_writing_is_slow(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(long_run.time, "monotonic", lambda: now[0])
    kept = Checkpoint(tmp_path / "c.safetensors", "key")
    assert not kept.due
    now[0] = 30
    assert kept.due

    def slowly(*_):
        now[0] += 4

    monkeypatch.setattr(long_run, "write_streamed", slowly)
    kept.save({}, {})
    now[0] = 34 + 39
    assert not kept.due
    now[0] = 34 + 40
    assert kept.due


def test_a_training_begun_on_another_kind_of_device_goes_on_and_says_so(tmp_path, saved_at_every_step, said):
    path = tmp_path / "c.safetensors"
    with pytest.raises(Stopped):
        run_phase1(hooks(path, stop_at=4)[0])
    kept = Checkpoint(path, "key")
    tensors, state = kept.restore()
    assert not any(isinstance(each, bool) for each in state["numbers"].values())  # flags are a device's
    tensors["draws/cuda"] = tensors.pop("draws/cpu")
    kept.save({name: tensor.clone() for name, tensor in tensors.items()}, state)
    loop, heard = hooks(path)
    run_phase1(loop)
    assert [metric["iteration"] for metric in heard] == list(range(2, 9))
    assert said == ["The training was begun on another device: random draws continue differently here."]
