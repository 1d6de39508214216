import copy
import gc

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model

from ctxkv_lib.config import Phase2Config
from ctxkv_lib.errors import UserError
from ctxkv_lib.files import read_tensors
from ctxkv_lib.training.caches import StreamCache
from ctxkv_lib.training.evaluation import evaluate
from ctxkv_lib.training.phase2 import EarlyStopping, best_epoch, train_attention


def stream(count):
    contexts = torch.randn(count, TINY["context_dim"], generator=torch.Generator().manual_seed(count))
    contexts[0] = 0
    return StreamCache(tiny_ids(count, seed=count).int(), contexts)


TRAIN, VAL = stream(500), stream(120)
CONFIG = Phase2Config(max_epochs=4, batch_size=64, patience=4)


def train(checkpoint, config=CONFIG, listener=lambda metric: None, key="k"):
    model = tiny_model()
    result = train_attention(model, TRAIN, VAL, config, 1, checkpoint, key, listener)
    return model, [{k: v for k, v in m.items() if k not in ("seconds", "memory")} for m in result.epochs]


def test_stopped_and_resumed_gives_the_same_numbers(tmp_path):
    whole, epochs = train(tmp_path / "whole")

    def interrupt(metric):
        if metric["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", listener=interrupt)
    heard = []
    resumed, again = train(tmp_path / "stopped", listener=heard.append)
    assert again == epochs
    assert [m["epoch"] for m in heard] == [1, 2, 3, 4]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_same_seed_same_numbers(tmp_path):
    assert train(tmp_path / "a")[1] == train(tmp_path / "b")[1]


def test_a_checkpoint_of_something_else_is_not_taken_up(tmp_path):
    short = Phase2Config(max_epochs=1, batch_size=64)
    train(tmp_path / "c", short, key="other")
    heard = []
    train(tmp_path / "c", CONFIG, heard.append)
    assert [m["epoch"] for m in heard] == [1, 2, 3, 4]


def test_the_best_epoch_is_kept(tmp_path):
    config = Phase2Config(max_epochs=30, batch_size=16, learning_rate=0.02, patience=2)
    model, epochs = train(tmp_path / "c", config)
    best = best_epoch(epochs)
    assert best["val_ppl"] == min(e["val_ppl"] for e in epochs)
    assert best["epoch"] < len(epochs)
    assert evaluate(model, VAL).perplexity == best["val_ppl"]


def test_only_attention_and_feed_forward_change(tmp_path):
    before = copy.deepcopy(tiny_model().state_dict())
    after = train(tmp_path / "c")[0].state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"attention", "feed_forward"}


def test_early_stopping_wants_strictly_lower():
    stopping = EarlyStopping(patience=2)
    assert [stopping.improved(ppl) for ppl in (5.0, 5.0, 4.0, 4.5, 4.0)] == [True, False, True, False, False]
    assert stopping.should_stop


def test_bf16_products_train_as_well_and_leave_everything_else_fp32(tmp_path):
    config = Phase2Config(max_epochs=6, batch_size=64, patience=6)
    rounded = StreamCache(TRAIN.ids, TRAIN.contexts.bfloat16())
    full, half = tiny_model(), tiny_model()
    expected = train_attention(full, TRAIN, VAL, config, 1, tmp_path / "full", "k", lambda metric: None)
    found = train_attention(half, rounded, VAL, config, 1, tmp_path / "half", "k", lambda metric: None)
    assert found.epochs[0]["train_ppl"] != expected.epochs[0]["train_ppl"]
    for ours, theirs in zip(found.epochs, expected.epochs, strict=True):
        assert ours["val_ppl"] == pytest.approx(theirs["val_ppl"], rel=0.01)
        assert ours["train_ppl"] == pytest.approx(theirs["train_ppl"], rel=0.01)
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    assert all(tensor.dtype == torch.float32 for tensor in read_tensors(tmp_path / "half").values())
    assert evaluate(half, VAL).perplexity == best_epoch(found.epochs)["val_ppl"]


@pytest.mark.slow
def test_memory_does_not_grow_over_epochs(tmp_path):
    held = []

    def count(metric):
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        held.append(sum(tensor.nbytes for tensor in tensors))

    train(tmp_path / "c", Phase2Config(max_epochs=6, batch_size=64, patience=6), count)
    assert len(held) == 6
    assert len(set(held[1:])) == 1, held


def test_divergence_is_an_error_not_a_number(tmp_path):
    config = Phase2Config(max_epochs=3, batch_size=16, learning_rate=1e30)
    with pytest.raises(UserError, match=r"diverged in epoch 1 .*lower phase2\.learning_rate"):
        train(tmp_path / "c", config)
