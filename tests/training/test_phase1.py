import json

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model
from ctxkv_lib.training.phase1 import train_context_block

from ctxkv_lib.errors import UserError
from ctxkv_lib.method import oacd as phase1
from ctxkv_lib.method.contexts import distinct_rows
from ctxkv_lib.runs import placement
from ctxkv_lib.runs.config import Phase1Config

CONFIG = Phase1Config(max_iterations=8, batch_size=150)


class Stopped(Exception):
    pass


def train(config=CONFIG, listener=lambda metric: None, checkpoint=None, rows=None, folder=None):
    """Result, metrics without times, and all tensors that Phase 1 leaves; contexts in a file in `folder`."""
    model, lines = tiny_model(), []
    model.set_phase(1)
    rows = rows or distinct_rows(model, tiny_ids(400))
    shape = len(rows[1]) + 1, TINY["context_dim"]
    contexts = placement.scratch(shape, torch.float32, placement.HOST, folder, spare_memory=bool(folder))
    generator = torch.Generator().manual_seed(2)

    def hear(metric):
        lines.append({name: value for name, value in metric.items() if name != "seconds"})
        listener(metric)

    result = train_context_block(
        model.context_block, *rows, config, contexts, generator, hear, checkpoint, "key"
    )
    tensors = [*model.context_block.state_dict().values(), contexts, generator.get_state()]
    return (result.iterations, result.convergence_rate, result.stop_reason), lines, tensors


def test_contexts_in_a_mapped_file_stopped_and_resumed_are_those_in_memory(
    tmp_path, saved_at_every_step, monkeypatch
):
    monkeypatch.setattr(placement, "PART_ROWS", 150)

    def stop(metric):
        if metric["iteration"] == 4:
            raise Stopped

    whole, path = train(), tmp_path / "c.safetensors"
    with pytest.raises(Stopped):
        train(listener=stop, checkpoint=path, folder=tmp_path)
    resumed = train(checkpoint=path, folder=tmp_path)
    assert resumed[:2] == whole[:2]
    for ours, theirs in zip(resumed[2], whole[2], strict=True):
        assert torch.equal(ours, theirs)


PLATEAU = {"convergence_threshold": 1.0, "plateau_rate": 0.0, "plateau_gain": 1.0, "plateau_patience": 6}


@pytest.mark.parametrize("changes", [{}, PLATEAU])
@pytest.mark.parametrize("stopped_at", [2, 3, 6])
def test_stopped_and_resumed_gives_the_same_numbers(tmp_path, saved_at_every_step, stopped_at, changes):
    config = Phase1Config(max_iterations=8, batch_size=150, **changes)
    whole = train(config)

    def stop(metric):
        if metric["iteration"] == stopped_at:
            raise Stopped

    path = tmp_path / "c.safetensors"
    with pytest.raises(Stopped):
        train(config, stop, path)
    iterations = []
    with pytest.MonkeyPatch.context() as patch:
        original = phase1.train_iteration
        patch.setattr(phase1, "train_iteration", lambda *a: iterations.append(1) or original(*a))
        resumed = train(config, checkpoint=path)
    assert len(iterations) == whole[0][0] - stopped_at
    assert resumed[:2] == whole[:2]
    for ours, theirs in zip(resumed[2], whole[2], strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_are_clipped(monkeypatch):
    """Adam hardly minds a gradient's scale, so this looks at the gradient that it is given."""
    norms = []

    def step(optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    train(Phase1Config(max_iterations=3, clip_norm=1e-3))
    train(Phase1Config(max_iterations=3, clip_norm=1e3))
    assert norms[:2] == pytest.approx([1e-3] * 2, rel=1e-2)
    assert min(norms[2:]) > 2e-3


@pytest.mark.parametrize("changes", [{"initial_std": 1e38}, {"noise_std": 1e38}])
def test_a_loss_that_is_not_finite_ends_it_at_once(changes):
    lines = []
    with pytest.raises(UserError, match=r"diverged in iteration 2: .*lower phase1\.learning_rate"):
        train(Phase1Config(**changes), lines.append)
    assert lines == []


@pytest.mark.parametrize(
    ("rate", "cause"), [(1e12, "the loss is nan"), (1e16, r"linear\.weight is not finite")]
)
def test_a_rate_that_is_too_large_ends_it_and_leaves_only_finite_lines(rate, cause):
    lines = []
    with pytest.raises(UserError, match=rf"diverged in iteration \d: {cause}.*; lower phase1\.learning_rate"):
        train(Phase1Config(learning_rate=rate), lines.append)
    assert all(json.dumps(line, allow_nan=False) for line in lines)


@pytest.mark.parametrize("kind", [MemoryError, torch.cuda.OutOfMemoryError])
def test_batches_are_split_when_memory_is_exhausted(monkeypatch, kind):
    whole, said, original = train(), [], phase1.F.embedding

    def little_memory(rows, table):
        if len(rows) > 40:
            raise kind("no more")
        return original(rows, table)

    monkeypatch.setattr(placement, "say", said.append)
    rows = distinct_rows(tiny_model(), tiny_ids(400))
    monkeypatch.setattr(phase1.F, "embedding", little_memory)
    split = train(rows=rows)
    assert len(said) == 1
    assert split[0] == whole[0]
    for ours, theirs in zip(split[2], whole[2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_other_errors_are_not_taken_for_exhausted_memory(monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(phase1, "oacd_loss", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train()
