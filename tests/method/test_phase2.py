"""Phase 2 against the reference, and what must not change its numbers."""

import gc
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from conftest import cloned, tiny_method, tiny_stream

from ctxkv_lib.method import phase2, reference
from ctxkv_lib.method.caches import StreamCache, epoch_seed
from ctxkv_lib.method.config import Phase2Config
from ctxkv_lib.method.evaluation import evaluate, perplexity
from ctxkv_lib.method.loop import Diverged, Loop
from ctxkv_lib.method.model import Parts
from ctxkv_lib.method.optimizer import Stepper
from ctxkv_lib.method.phase2 import RowsOfDropout, batch_gradients, train_attention
from ctxkv_lib.method.tuned import SlotAttention

SEED = 3


TRAIN, VAL = tiny_stream(1399), tiny_stream(299)
CONFIG = Phase2Config(max_epochs=3, batch_size=100, patience=3)


def slot_attention(config):
    return SlotAttention(config, SlotAttention.Settings())


def train(config=CONFIG, model=None, loop=None, data=TRAIN):
    """Model, epochs without times, and stop reason."""
    model = model or tiny_method(attention_dropout=0.1)
    result = train_attention(model, data, VAL, config, SEED, loop)
    epochs = [{k: v for k, v in e.items() if k not in ("seconds", "memory")} for e in result.epochs]
    return model, epochs, result.stop_reason


def train_reference(p, config, shape):
    def order(epoch):
        torch.manual_seed(epoch_seed(SEED, epoch))  # the epoch's dropout
        return TRAIN.epoch_order(SEED, epoch)

    table, val_ids = p["wte.weight"], VAL.ids.long()
    streams = TRAIN.ids.long(), TRAIN.contexts[1:], val_ids, VAL.contexts[1:]
    return reference.phase2(p, table, *streams, shape, config, order)


def test_a_few_steps_equal_the_reference():
    """Of 1,399 positions, the last of 3 batches has 199."""
    model = tiny_method(attention_dropout=0.1)
    config = Phase2Config(max_epochs=2, batch_size=600, learning_rate=0.01, weight_decay=0.5)
    p = cloned(model)
    expected = train_reference(p, config, model.config)["epochs"]
    _, epochs, _ = train(config, model)
    assert epochs[0]["train_ppl"] == pytest.approx(expected[0]["train_ppl"], rel=1e-5)
    del p["attention.k.bias"]  # its gradient is 0, of which the reference has roundings, and Adam steps
    for name, value in p.items():  # of which the frozen ones are untouched
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-4, rtol=0, msg=name)


def test_train_ppl_counts_small_losses_beside_a_large_sum(monkeypatch):
    """In fp32, 2^26 + 1 is 2^26: the twelve batches between would add nothing."""
    losses = iter([2.0**26, *[1.0] * 12, -(2.0**26)])
    monkeypatch.setattr(phase2, "train_step", lambda *_: torch.tensor(next(losses)))
    _, (epoch,), _ = train(Phase2Config(max_epochs=1, batch_size=100))
    assert epoch["train_ppl"] == pytest.approx(perplexity(12 / len(TRAIN)), rel=1e-9)


def test_a_whole_training_equals_the_reference_and_keeps_the_best_epoch():
    model = tiny_method(attention_dropout=0.1)
    config = Phase2Config(max_epochs=30, batch_size=100, learning_rate=0.02, patience=2)
    expected = train_reference(cloned(model), config, model.config)
    _, epochs, reason = train(config, model)
    assert (reason, len(epochs)) == (expected["stop_reason"], len(expected["epochs"]))
    for ours, theirs in zip(epochs, expected["epochs"], strict=True):
        assert (ours["improved"], ours["no_improve"]) == (theirs["improved"], theirs["no_improve"])
        for name in ("train_ppl", "val_ppl"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.01), name
        assert ours["val_acc"] == pytest.approx(theirs["val_acc"], abs=0.01)
    best = [epoch for epoch in epochs if epoch["improved"]][-1]
    assert best["epoch"] == expected["best_epoch"] < len(epochs)
    assert perplexity(evaluate(model, VAL)[0]) == best["val_ppl"] == min(epoch["val_ppl"] for epoch in epochs)
    assert not model.training


def test_same_seed_same_numbers_in_whatever_mode_the_model_comes():
    expected = train()[1]
    assert train(model=tiny_method(attention_dropout=0.1).eval())[1] == expected


@pytest.mark.parametrize("pool", [None, 100, 333, 5000])
def test_every_epoch_and_seed_visits_all_positions_in_an_order_of_its_own(pool):
    stream = replace(TRAIN, pool=pool)
    orders = [stream.epoch_order(seed, epoch).tolist() for seed in (1, 2) for epoch in (1, 2)]
    assert all(sorted(order) == list(range(len(TRAIN))) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert pool is None or pool > len(TRAIN) or len({each // 12 for each in orders[0][:96]}) < 96 / 3


@pytest.mark.parametrize("parts", [Parts(), Parts(attention=slot_attention)])
def test_shards_of_a_batch_have_the_gradients_of_the_whole(parts):
    """Several processes, each with the same random state; one has no positions."""
    model = tiny_method(parts, attention_dropout=0.3).train()
    batch, table = TRAIN.gather(torch.arange(41), model.window), model.wte.weight.detach()

    def gradients(*shards):
        model.zero_grad()
        for rows in shards:
            torch.manual_seed(0)
            with RowsOfDropout(41, rows):
                batch_gradients(model, table, 41, batch.each(lambda tensor: tensor[rows]))  # noqa: B023
        return {name: weight.grad.clone() for name, weight in model.trained_weights().items()}

    whole = gradients(slice(0, 41))
    for name, found in gradients(slice(0, 13), slice(13, 41), slice(41, 41)).items():
        torch.testing.assert_close(found, whole[name], msg=name)


def test_early_stopping_wants_strictly_lower(monkeypatch):
    losses = iter([5.0, 5.0, 4.0, 4.5, 4.0])
    monkeypatch.setattr(phase2, "evaluate", lambda *_: (next(losses), 0.0))
    _, epochs, reason = train(Phase2Config(max_epochs=9, batch_size=100, patience=2))
    assert [epoch["improved"] for epoch in epochs] == [True, False, True, False, False]
    assert reason == "early_stopping"


def test_the_averages_of_a_stepper_are_validated_and_kept():
    model, epochs, _ = train(replace(CONFIG, optimizer="scheduled"))
    assert epochs[0]["train_ppl"] != train()[1][0]["train_ppl"]
    assert perplexity(evaluate(model, VAL)[0]) == min(epoch["val_ppl"] for epoch in epochs)


def test_bf16_products_train_as_well_and_leave_everything_else_fp32():
    config = Phase2Config(max_epochs=6, batch_size=64, patience=6)
    rounded = StreamCache(TRAIN.ids, TRAIN.contexts.bfloat16())
    _, expected, _ = train(config)
    model, found, _ = train(config, data=rounded)
    assert found[0]["train_ppl"] != expected[0]["train_ppl"]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["val_ppl"] == pytest.approx(theirs["val_ppl"], rel=0.01)
        assert ours["train_ppl"] == pytest.approx(theirs["train_ppl"], rel=0.01)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_epochs_have_seconds_of_their_own_and_steps_are_numbered_over_all(monkeypatch):
    monkeypatch.setattr(Stepper, "schedule", schedule := Mock())
    began = time.perf_counter()
    epochs = train_attention(tiny_method(), TRAIN, VAL, CONFIG, SEED).epochs
    assert 0 < sum(epoch["seconds"] for epoch in epochs) < time.perf_counter() - began + 0.002
    assert [call.args[0] for call in schedule.mock_calls] == [*range(3 * 14)]


@pytest.mark.slow
def test_memory_does_not_grow_over_steps_and_epochs():
    held = []

    class Counting(Loop):
        def after_round(self, state, metric):
            gc.collect()
            kinds = torch.Tensor, torch.nn.Parameter  # not what `torch.export` left behind in another test
            tensors = [thing for thing in gc.get_objects() if type(thing) in kinds]
            held.append(sum(tensor.nbytes for tensor in tensors))

    train(Phase2Config(max_epochs=6, batch_size=64, patience=6), loop=Counting())
    assert len(held) == 6
    assert len(set(held[1:])) == 1, held


@pytest.mark.parametrize(
    ("rate", "size", "where"), [(1e30, 4, r"by step 50 of 350"), (1e25, 4, "by step 50"), (1e30, 140, "")]
)
def test_divergence_is_an_error_within_the_epoch_and_not_a_number(rate, size, where):
    config = Phase2Config(max_epochs=3, batch_size=size, learning_rate=rate)
    with pytest.raises(Diverged, match=rf"diverged in epoch 1 \({where}.*lower phase2\.learning_rate"):
        train(config)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_divergence_that_one_split_shows_is_an_error_too(split, monkeypatch):
    found = {"train": ("batch_gradients", torch.tensor(1e9)), "validation": ("evaluate", (800.0, 0.0))}
    name, value = found[split]
    monkeypatch.setattr(phase2, name, lambda *_: value)
    with pytest.raises(Diverged, match=rf"{split} loss \d"):
        train(Phase2Config(max_epochs=1, batch_size=100))
