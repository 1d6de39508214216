"""Phase 2 equals the reference, and raises an error when it diverges."""

import gc
from dataclasses import replace

import pytest
import torch
from conftest import cloned, tiny_method, tiny_stream

from ctxkv_lib.method import phase2, reference
from ctxkv_lib.method.callback import Callback, Diverged
from ctxkv_lib.method.config import Phase2Config
from ctxkv_lib.method.phase2 import batch_gradients, epoch_order, epoch_seed, train_layer
from ctxkv_lib.method.scoring import mean_scores, perplexity
from ctxkv_lib.method.streams import DTYPES

SEED = 3
TRAIN, VAL = tiny_stream(1399), tiny_stream(299)
CONFIG = Phase2Config(max_epochs=3, batch_size=100, patience=3)


def train(config=CONFIG, model=None, callback=None, precision="fp32"):
    """Return the model, the epochs without their times, and the stop reason."""
    model = model or tiny_method(attention_dropout=0.1)
    result = train_layer(model, TRAIN, VAL, config, SEED, precision, callback)
    epochs = [{k: v for k, v in e.items() if k not in ("seconds", "memory")} for e in result.epochs]
    return model, epochs, result.stop_reason


def train_reference(p, config, shape):
    def order(epoch):
        torch.manual_seed(epoch_seed(SEED, epoch))  # for the epoch's dropout
        return epoch_order(len(TRAIN), SEED, epoch)

    table, val_ids = p["wte.weight"], VAL.ids.long()
    streams = TRAIN.ids.long(), TRAIN.contexts[1:], val_ids, VAL.contexts[1:]
    return reference.phase2(p, table, *streams, shape, config, order)


def test_a_few_steps_equal_the_reference():
    """An epoch has 1,399 positions in 3 batches; the last batch has 199."""
    model = tiny_method(attention_dropout=0.1)
    config = Phase2Config(max_epochs=2, batch_size=600, learning_rate=0.01, weight_decay=0.5)
    p = cloned(model)
    expected = train_reference(p, config, model.config)["epochs"]
    _, epochs, _ = train(config, model)
    assert epochs[0]["train_ppl"] == pytest.approx(expected[0]["train_ppl"], rel=1e-5)
    # The true gradient of k.bias is 0, but rounding errors let the reference's Adam change it.
    del p["attention.k.bias"]
    trained = cloned(model)
    for name, value in p.items():  # frozen weights, too
        torch.testing.assert_close(trained[name], value, atol=1e-4, rtol=0, msg=name)


def test_a_whole_training_run_equals_the_reference_and_keeps_the_best_epoch():
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
    assert perplexity(mean_scores(model, VAL)[0]) == best["val_ppl"]
    assert best["val_ppl"] == min(epoch["val_ppl"] for epoch in epochs)
    assert not model.training


def test_the_same_seed_gives_the_same_numbers_in_training_and_evaluation_mode():
    expected = train()[1]
    assert train(model=tiny_method(attention_dropout=0.1).eval())[1] == expected


@pytest.mark.parametrize("pool", [100, 333, 5000])
def test_every_epoch_and_seed_visits_all_positions_in_its_own_order(pool, monkeypatch):
    monkeypatch.setattr(phase2, "POOL", pool)
    orders = [epoch_order(len(TRAIN), seed, epoch).tolist() for seed in (1, 2) for epoch in (1, 2)]
    assert all(sorted(order) == list(range(len(TRAIN))) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert pool > len(TRAIN) or len({each // 12 for each in orders[0][:96]}) < 96 / 3


def test_the_averages_of_a_stepper_are_validated_and_kept():
    model, epochs, _ = train(replace(CONFIG, optimizer="scheduled"))
    assert epochs[0]["train_ppl"] != train()[1][0]["train_ppl"]
    assert perplexity(mean_scores(model, VAL)[0]) == min(epoch["val_ppl"] for epoch in epochs)


def test_bf16_products_train_as_well_and_leave_everything_else_fp32():
    config = Phase2Config(max_epochs=6, batch_size=64, patience=6)
    _, expected, _ = train(config)
    model, found, _ = train(config, precision="bf16")
    assert found[0]["train_ppl"] != expected[0]["train_ppl"]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["val_ppl"] == pytest.approx(theirs["val_ppl"], rel=0.01)
        assert ours["train_ppl"] == pytest.approx(theirs["train_ppl"], rel=0.01)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_gradients_in_bf16_equal_those_in_fp32_except_for_rounding():
    model = tiny_method().eval()
    batch = model.batch(TRAIN, torch.arange(64))
    gradients = {}
    for precision, dtype in DTYPES.items():
        model.zero_grad()
        loss = batch_gradients(model, model.wte.weight.detach().to(dtype), batch, precision)
        weights = model.trained_weights()
        gradients[precision] = {"loss": loss} | {name: weight.grad for name, weight in weights.items()}
    del gradients["fp32"]["layer.attention.k.bias"]  # its gradient is 0
    for name, exact in gradients["fp32"].items():
        rounded = gradients["bf16"][name]
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).norm() < 0.03 * exact.norm(), name


@pytest.mark.slow
def test_memory_does_not_grow_over_steps_and_epochs():
    held = []

    class Counting(Callback):
        def after_round(self, state, metric):
            gc.collect()
            kinds = torch.Tensor, torch.nn.Parameter  # skip what `torch.export` left behind in other tests
            tensors = [thing for thing in gc.get_objects() if type(thing) in kinds]
            held.append(sum(tensor.nbytes for tensor in tensors))

    train(Phase2Config(max_epochs=6, batch_size=64, patience=6), callback=Counting())
    assert len(held) == 6
    assert len(set(held[1:])) == 1, held


@pytest.mark.parametrize(
    ("rate", "size", "where"), [(1e30, 4, r"by step 50 of 350"), (1e25, 4, "by step 50"), (1e30, 140, "")]
)
def test_divergence_is_an_error_within_the_epoch_and_not_a_number(rate, size, where):
    config = Phase2Config(max_epochs=3, batch_size=size, learning_rate=rate)
    with pytest.raises(Diverged, match=rf"diverged in epoch 1 \({where}.*lower phase2\.learning_rate"):
        train(config)


def test_the_loss_within_an_epoch_is_the_mean_of_fifty_steps(monkeypatch):
    heard, losses = [], iter(range(1000))

    class Hearing(Callback):
        def after_steps(self, metric):
            heard.append(metric)

    monkeypatch.setattr(phase2, "train_step", lambda *_: torch.tensor(7.0 * next(losses)))
    train(Phase2Config(max_epochs=2, batch_size=7), callback=Hearing())  # step 200 ends an epoch
    places = [(epoch, step) for epoch in (1, 2) for step in (50, 100, 150)]
    expected = [(epoch, step, 200 * (epoch - 1) + step - 25.5) for epoch, step in places]
    assert [(line["epoch"], line["step"], line["loss"]) for line in heard] == expected
    assert {(line["stage"], line["steps"], line["learning_rate"]) for line in heard} == {
        ("phase2", 200, 1e-3)
    }


@pytest.mark.parametrize("split", ["train", "validation"])
def test_divergence_on_either_split_is_an_error(split, monkeypatch):
    found = {"train": ("batch_gradients", torch.tensor(1e9)), "validation": ("mean_scores", (800.0, 0.0))}
    name, value = found[split]
    monkeypatch.setattr(phase2, name, lambda *_: value)
    with pytest.raises(Diverged, match=rf"{split} loss \d"):
        train(Phase2Config(max_epochs=1, batch_size=100))
