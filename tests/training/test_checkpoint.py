import pytest
import torch
from conftest import tiny_model

from ctxkv_lib.runs import checkpoint
from ctxkv_lib.runs.checkpoint import Checkpoint, forget, optimizer_tensors, put_back, saved_draws


@pytest.fixture
def kept(tmp_path):
    """A checkpoint that holds state 2, and state 1 before it."""
    kept = Checkpoint(tmp_path / "c.safetensors", "key")
    for number in (1, 2):
        kept.save({"x": torch.full((3,), float(number))}, {"number": number})
    return kept


def found(kept):
    return kept.restore() and (kept.restore()[1]["number"], kept.restore()[0]["x"][0].item())


def test_the_newest_state_is_taken_up(kept):
    assert found(kept) == (2, 2.0)


@pytest.mark.parametrize("damage", ["torn", "gone", "empty"])
def test_a_torn_state_is_passed_over_with_a_word(kept, monkeypatch, damage):
    said = []
    monkeypatch.setattr(checkpoint, "notice", said.append)
    if damage == "gone":
        kept.path.unlink()
    else:
        kept.path.write_bytes(kept.path.read_bytes()[: 60 if damage == "torn" else 0])
    assert found(kept) == (1, 1.0)
    assert len(said) == (damage != "gone")
    kept.save({"x": torch.full((3,), 3.0)}, {"number": 3})
    kept.path.write_bytes(b"torn again")
    assert found(kept) == (1, 1.0)  # the one that could be read was not replaced by the torn one


def test_nothing_is_taken_up_for_another_key(kept):
    assert Checkpoint(kept.path, "other").restore() is None


def test_both_states_are_forgotten(kept):
    forget(kept.path)
    assert not any(kept.path.parent.iterdir())
    assert kept.restore() is None


def test_it_is_due_every_half_minute_and_less_often_where_writing_is_slow(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    kept = Checkpoint(tmp_path / "c.safetensors", "key")
    assert not kept.due
    now[0] = 30
    assert kept.due

    def slowly(*_):
        now[0] += 4

    monkeypatch.setattr(checkpoint, "write_streamed", slowly)
    kept.save({}, {})
    now[0] = 34 + 39
    assert not kept.due
    now[0] = 34 + 40
    assert kept.due


def test_draws_of_another_kind_of_device_are_left_out_with_a_word(monkeypatch):
    said = []
    monkeypatch.setattr(checkpoint, "say", said.append)
    assert saved_draws({"draws/cuda": torch.zeros(2)}, torch.device("cpu")) is None
    assert len(said) == 1


def test_an_optimizer_goes_on_from_what_was_put_back():
    weights, optimizers = [], []
    for seed in (0, 1):
        block = tiny_model(seed).context_block
        weights.append(dict(block.named_parameters()))
        optimizers.append(torch.optim.Adam(block.parameters()))

    def step(number):
        for parameter in weights[number].values():
            parameter.grad = torch.ones_like(parameter) * parameter.detach().sum()
        optimizers[number].step()

    step(0)
    put_back(optimizer_tensors(weights[0], optimizers[0]), weights[1], optimizers[1])
    step(0)
    step(1)
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
