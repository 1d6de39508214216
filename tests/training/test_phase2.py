import copy
import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_ids, tiny_model
from ctxkv_lib.training.phase2 import EarlyStopping, best_epoch, train_attention

from ctxkv_lib.errors import UserError
from ctxkv_lib.files import read_tensors
from ctxkv_lib.hf import modeling
from ctxkv_lib.method import evaluation, phase2
from ctxkv_lib.method.caches import StreamCache, epoch_order
from ctxkv_lib.method.evaluation import evaluate
from ctxkv_lib.runs import placement
from ctxkv_lib.runs.config import Phase2Config


def stream(count):
    contexts = torch.randn(count, TINY["context_dim"], generator=torch.Generator().manual_seed(count))
    contexts[0] = 0
    return StreamCache(tiny_ids(count, seed=count).int(), contexts)


TRAIN, VAL = stream(500), stream(120)
CONFIG = Phase2Config(max_epochs=4, batch_size=64, patience=4)


def train(checkpoint, config=CONFIG, listener=lambda metric: None, key="k", model=None):
    model = model or tiny_model()
    result = train_attention(model, TRAIN, VAL, config, 1, checkpoint, key, listener)
    return model, [{k: v for k, v in m.items() if k not in ("seconds", "memory")} for m in result.epochs]


SCHEDULED = Phase2Config(
    max_epochs=4, batch_size=64, patience=4, schedule="cosine", warmup=0.2, averaging=0.9
)


@pytest.mark.parametrize("config", [CONFIG, SCHEDULED])
def test_stopped_and_resumed_gives_the_same_numbers(tmp_path, config):
    whole, epochs = train(tmp_path / "whole", config)

    def interrupt(metric):
        if metric["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", config, interrupt)
    heard = []
    resumed, again = train(tmp_path / "stopped", config, heard.append)
    assert again == epochs
    assert [m["epoch"] for m in heard] == [1, 2, 3, 4]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stopped_at", [0, 1, 6, 7, 8, 9, 20, 31])  # an epoch has 8 steps
@pytest.mark.parametrize("config", [CONFIG, SCHEDULED])
def test_stopped_within_an_epoch_gives_the_same_numbers(tmp_path, saved_at_every_step, stopped_at, config):
    whole, epochs = train(tmp_path / "whole", config)
    original, steps = phase2.add_gradients, []

    def counted(*batch):
        steps.append(1)
        if len(steps) == stopped_at + 1:
            raise Stopped
        return original(*batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase2, "add_gradients", counted)
        with pytest.raises(Stopped):
            train(tmp_path / "stopped", config)
        resumed, again = train(tmp_path / "stopped", config)
    assert len(steps) == 4 * 8 + 1  # nothing but the step that failed was done twice
    assert again == epochs
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_torn_checkpoint_is_passed_over_for_the_one_before_it(tmp_path, saved_at_every_step):
    whole, epochs = train(tmp_path / "whole")

    def stop(metric):
        if metric["epoch"] == 3:
            raise Stopped

    with pytest.raises(Stopped):
        train(tmp_path / "stopped", listener=stop)
    (tmp_path / "stopped").write_bytes((tmp_path / "stopped").read_bytes()[:-9])
    resumed, again = train(tmp_path / "stopped")
    assert again == epochs
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("kind", [MemoryError, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("ahead", [False, True])
def test_batches_are_split_when_memory_is_exhausted(tmp_path, monkeypatch, kind, ahead):
    dropped = {"input_dropout": 0.2, "layer_dropout": 0.3}
    _, epochs = train(tmp_path / "whole", model=tiny_model(**dropped))
    said, original = [], modeling.frozen_head_cross_entropy

    def little_memory(hidden, *others):
        if len(hidden) > 20:
            raise kind("no more")
        return original(hidden, *others)

    monkeypatch.setattr(placement, "say", said.append)
    monkeypatch.setattr(modeling, "frozen_head_cross_entropy", little_memory)
    if ahead:  # as if the caches were not where the model is
        monkeypatch.setattr(StreamCache, "tensors", lambda cache: {"ids": torch.empty(0, device="meta")})
    _, split = train(tmp_path / "split", model=tiny_model(**dropped))
    assert [line.split(": ")[1].split()[0] for line in said] == ["Phase", "validation"]  # once each
    for ours, theirs in zip(split, epochs, strict=True):
        for name in ("train_ppl", "val_ppl", "val_acc"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_an_evaluation_goes_on_from_where_memory_ended(monkeypatch):
    model, attempts, original = tiny_model(), [], modeling.frozen_head_cross_entropy
    whole = evaluation.token_scores(model, VAL, torch.arange(len(VAL)))

    def exhausted_once(*arguments):
        attempts.append(1)
        if len(attempts) == 3:
            raise MemoryError
        return original(*arguments)

    monkeypatch.setattr(evaluation, "EVALUATION_ROWS", 32)
    monkeypatch.setattr(modeling, "frozen_head_cross_entropy", exhausted_once)
    found = evaluation.token_scores(model, VAL, torch.arange(len(VAL)))
    torch.testing.assert_close(found[0], whole[0])
    assert torch.equal(found[1], whole[1])


def test_a_batch_of_one_row_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    def no_memory(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: not enough memory: ...")

    monkeypatch.setattr(modeling, "frozen_head_cross_entropy", no_memory)
    with pytest.raises(RuntimeError, match="not enough memory"):
        train(tmp_path / "c")


def test_same_seed_same_numbers(tmp_path):
    assert train(tmp_path / "a")[1] == train(tmp_path / "b")[1]


def test_dropout_is_on_however_the_model_is_handed_over(tmp_path):
    assert train(tmp_path / "a", model=tiny_model().eval())[1] == train(tmp_path / "b")[1]


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


def test_gradients_are_those_of_the_mean_loss():
    """AdamW hardly minds a gradient's scale, so this looks at the gradients themselves."""
    model = tiny_model().eval()
    batch = TRAIN.gather(torch.arange(40), model.config)
    gradients = []
    for whole in (False, True):
        model.zero_grad()
        if whole:
            hidden, _ = batch.attend(model)
            F.cross_entropy(model.logits(hidden, batch.tokens), batch.targets).backward()
        else:
            phase2.add_gradients(model, model.wte.weight.detach(), batch, 40)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, found in gradients[0].items():
        torch.testing.assert_close(found, gradients[1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_every_epoch_and_seed_visits_all_positions_in_an_order_of_its_own():
    orders = [epoch_order(100, seed, epoch).tolist() for seed in (1, 2) for epoch in (1, 2)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_early_stopping_wants_strictly_lower():
    stopping = EarlyStopping(patience=2)
    assert [stopping.improved(ppl) for ppl in (5.0, 5.0, 4.0, 4.5, 4.0)] == [True, False, True, False, False]
    assert stopping.should_stop


def test_training_decays_by_the_length_of_its_stream(tmp_path):
    plain = replace(CONFIG, weight_decay=3.0)
    longer = replace(CONFIG, weight_decay=3 * len(TRAIN) / 250, decay_tokens=250)
    (_, weaker), (_, same), (_, stronger) = (
        train(tmp_path / str(n), config)
        for n, config in enumerate([plain, longer, replace(longer, decay_tokens=0)])
    )
    assert same[-1]["val_ppl"] == pytest.approx(weaker[-1]["val_ppl"], rel=1e-6)
    assert stronger[-1]["val_ppl"] != pytest.approx(weaker[-1]["val_ppl"], rel=1e-3)


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
    saved = read_tensors(tmp_path / "half")
    assert {tensor.dtype for name, tensor in saved.items() if name != "draws/cpu"} == {torch.float32}
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


@pytest.mark.parametrize(("rate", "step"), [(1e30, 50), (1e25, 50)])
def test_divergence_is_an_error_within_the_epoch(tmp_path, rate, step):
    config = Phase2Config(max_epochs=3, batch_size=4, learning_rate=rate)
    with pytest.raises(UserError, match=rf"diverged in epoch 1 \(by step {step} of 125.*lower phase2\.learn"):
        train(tmp_path / "c", config)


def test_divergence_is_an_error_not_a_number(tmp_path):
    config = Phase2Config(max_epochs=3, batch_size=16, learning_rate=1e30)
    with pytest.raises(UserError, match=r"diverged in epoch 1 .*lower phase2\.learning_rate"):
        train(tmp_path / "c", config)
