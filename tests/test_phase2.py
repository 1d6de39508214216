import copy

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model

from ctxkv_lib.caches import StreamCache
from ctxkv_lib.config import Phase2Config
from ctxkv_lib.errors import UserError
from ctxkv_lib.evaluation import evaluate
from ctxkv_lib.phase2 import EarlyStopping, best_epoch, train_attention


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


def test_divergence_is_an_error_not_a_number(tmp_path):
    config = Phase2Config(max_epochs=3, batch_size=16, learning_rate=1e30)
    with pytest.raises(UserError, match=r"diverged in epoch 1 .*lower phase2\.learning_rate"):
        train(tmp_path / "c", config)
