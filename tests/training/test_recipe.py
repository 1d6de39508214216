"""The package against the straight-line recipe: same weights, same draws, same numbers."""

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model

from ctxkv_lib.method import reference as straight_line
from ctxkv_lib.method.caches import StreamCache, dense_embeddings, epoch_order, epoch_seed
from ctxkv_lib.method.evaluation import effective_rank, evaluate
from ctxkv_lib.method.oacd import StoppingRule, oacd_loss, train_context_block
from ctxkv_lib.method.phase2 import make_optimizer, train_attention, train_step
from ctxkv_lib.runs.config import Phase1Config, Phase2Config

SHAPE = {name: TINY[name] for name in ("interval", "max_contexts", "num_heads")}


def cloned(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def run_phase1(model, ids, config, seed=7):
    model.set_phase(1)
    distinct, tokens = ids[:-1].unique(return_inverse=True)
    with torch.no_grad():
        embeddings = model.embed(distinct)
    lines = []
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.empty(len(ids), TINY["context_dim"])
    result = train_context_block(
        model.context_block, embeddings, tokens, config, contexts, generator, lines.append
    )
    return result, lines, contexts


def plain_phase1(p, ids, config, seed=7):
    return straight_line.phase1(
        p,
        p["wte.weight"],
        ids,
        max_iterations=config.max_iterations,
        batch_size=config.batch_size,
        lr=config.learning_rate,
        noise_std=config.noise_std,
        initial_std=config.initial_std,
        centroid_weight=config.centroid_weight,
        clip_norm=config.clip_norm,
        threshold=config.convergence_threshold,
        stop_rate=config.stop_rate,
        plateau_rate=config.plateau_rate,
        plateau_gain=config.plateau_gain,
        plateau_patience=config.plateau_patience,
        seed=seed,
    )


@pytest.mark.parametrize("batch_size", [100, 333, 5000])
def test_phase1_step_by_step(batch_size):
    ids = tiny_ids(1001)
    config = Phase1Config(max_iterations=21, batch_size=batch_size)
    model = tiny_model()
    p = cloned(model)
    plain = plain_phase1(p, ids, config)
    _, lines, contexts = run_phase1(model, ids, config)
    assert len(lines) == 20
    torch.testing.assert_close([m["loss"] for m in lines], plain["losses"], atol=1e-4, rtol=0)
    torch.testing.assert_close([m["convergence_rate"] for m in lines], plain["rates"], atol=0.003, rtol=0)
    torch.testing.assert_close(contexts[1:], plain["contexts"], atol=1e-3, rtol=0)
    assert [m["iteration"] for m in lines] == list(range(2, 22))
    for name, value in model.context_block.state_dict().items():
        torch.testing.assert_close(value, p[f"context_block.{name}"], atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("count", [2, 3, 101])
def test_oacd_loss_and_its_gradient(count):
    contexts = torch.randn(count, 16, dtype=torch.float64, requires_grad=True)
    expected = straight_line.dispersion_loss(contexts, 0.1) / 7
    expected.backward()
    loss, gradient = oacd_loss(contexts.detach(), 0.1, scale=1 / 7)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, contexts.grad)


@pytest.mark.parametrize(
    "changes", [{"stop_rate": 0.3}, {"plateau_rate": 0.05, "plateau_gain": 0.5}, {"max_iterations": 3}]
)
def test_phase1_stops_as_the_recipe_does(changes):
    ids = tiny_ids(601)
    config = Phase1Config(**{"max_iterations": 40, "convergence_threshold": 0.3, **changes})
    model = tiny_model()
    plain = plain_phase1(cloned(model), ids, config)
    result, *_ = run_phase1(model, ids, config)
    assert (result.iterations, result.stop_reason) == (plain["iterations"], plain["stop_reason"])


def test_plateau_counts_only_running_stalls():
    rule = StoppingRule(Phase1Config())
    reasons = [rule.reason(rate) for rate in (0.51, 0.515, 0.60, 0.605, 0.606)]
    assert reasons == [None, None, None, None, "plateau"]
    assert StoppingRule(Phase1Config()).reason(0.90) == "converged"


@pytest.fixture
def prepared():
    """A tiny model without dropout, and caches of random contexts for 1,400 and 300 tokens."""
    model = tiny_model(attention_dropout=0.0)
    caches = []
    for count in (1400, 300):
        contexts = torch.randn(count, TINY["context_dim"], generator=torch.Generator().manual_seed(count))
        contexts[0] = 0
        caches.append(StreamCache(tiny_ids(count, seed=count).int(), contexts))
    return model, *caches


def plain_phase2(p, caches, config, seed, masked=False, dropout=0.0):
    train, val = caches

    def begin(epoch):
        torch.manual_seed(epoch_seed(seed, epoch))  # the dropout masks of the epoch
        return epoch_order(len(train), seed, epoch)

    return straight_line.phase2(
        p,
        p["wte.weight"],
        train.ids.long(),
        train.contexts[1:],
        val.ids.long(),
        val.contexts[1:],
        **SHAPE,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        batch_size=config.batch_size,
        max_epochs=config.max_epochs,
        patience=config.patience,
        permutations=begin,
        dropout=dropout,
        masked=masked,
    )


@pytest.mark.parametrize("kv_method", ["fixed", "variable"])
def test_phase2_step_by_step(prepared, kv_method):
    model, train, val = prepared
    model.config.kv_method = kv_method
    config = Phase2Config(max_epochs=1, batch_size=27)
    plain = plain_phase2(cloned(model), (train, val), config, seed=3, masked=kv_method == "variable")
    optimizer = make_optimizer(model, config, len(train))
    batches = train.batches(epoch_order(len(train), 3, 1), config.batch_size, model)
    table = model.wte.weight.detach()
    losses = [train_step(model, optimizer, table, batch).item() / len(batch.targets) for batch in batches]
    assert len(losses) >= 50
    torch.testing.assert_close(losses, plain["step_losses"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_phase2_whole_training(prepared, tmp_path, dropout):
    model, train, val = prepared
    model.attention.dropout.p = dropout
    config = Phase2Config(max_epochs=12, batch_size=100, learning_rate=3e-3, patience=2)
    plain = plain_phase2(cloned(model), (train, val), config, seed=3, dropout=dropout)
    result = train_attention(model, train, val, config, 3, tmp_path / "c", "key", lambda metric: None)
    assert result.stop_reason == plain["stop_reason"]
    assert len(result.epochs) == len(plain["epochs"])
    for ours, theirs in zip(result.epochs, plain["epochs"], strict=True):
        assert (ours["improved"], ours["no_improve"]) == (theirs["improved"], theirs["no_improve"])
        for name in ("train_ppl", "val_ppl"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.01), name
        assert ours["val_acc"] == pytest.approx(theirs["val_acc"], abs=0.01)
    best = plain["epochs"][plain["best_epoch"] - 1]
    assert evaluate(model, val).perplexity == pytest.approx(best["val_ppl"], rel=0.01)


def test_dense_embeddings_give_the_same_batches(prepared):
    model, train, _ = prepared
    model.eval()
    dense = StreamCache(train.ids, train.contexts, dense_embeddings(model, train.ids))
    positions = torch.tensor([0, 1, 2, 57, 1398])
    assert torch.equal(train.attend(model, positions)[0], dense.attend(model, positions)[0])
    assert len(dense.embeddings) == len(train) == 1399


@pytest.mark.parametrize("max_rows", [50, 1000])
def test_effective_rank(max_rows):
    contexts = torch.randn(200, 16)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    plain = straight_line.effective_rank(contexts, max_rows, generators[0])
    assert effective_rank(contexts, max_rows, generators[1]) == pytest.approx(plain, abs=1e-5)
    assert effective_rank(torch.eye(16), max_rows, generators[1]) == pytest.approx(1.0)
    assert effective_rank(torch.ones(99, 16), 1000, generators[1]) == pytest.approx(1 / 16, abs=1e-3)
