"""Phase 1 equals the reference for any block and any loss."""

import json

import pytest
import torch
from conftest import TINY, GatedBlock, cloned, tiny_ids, tiny_method
from torch import nn

from ctxkv_lib.method import reference
from ctxkv_lib.method.block import ContextBlock, project_inputs
from ctxkv_lib.method.callback import Callback, Diverged
from ctxkv_lib.method.config import Phase1Config
from ctxkv_lib.method.contexts import distinct_rows
from ctxkv_lib.method.oacd import Objective, StoppingRule, oacd_loss, train_context_block, train_iteration
from ctxkv_lib.method.scoring import effective_rank

WIDTH = TINY["context_dim"]


class Heard(Callback):
    """A callback that keeps the metrics."""

    def __init__(self):
        self.lines = []

    def after_round(self, state, metric):
        self.lines.append(metric)


def train(model, ids, config):
    """Train on all `ids` but the last; return the result, the metrics and the contexts after a zero row."""
    model.set_phase(1)
    callback, generator = Heard(), torch.Generator().manual_seed(7)
    rows = distinct_rows(model, ids[:-1])
    result, contexts = train_context_block(
        model.context_block, *rows, WIDTH, config, generator, callback=callback
    )
    return result, callback.lines, contexts


def train_reference(p, ids, config):
    return reference.phase1(p, p["wte.weight"], ids, config, seed=7)


@pytest.mark.parametrize("batch_size", [100, 333, 5000])  # 333 leaves a batch of 1 position
def test_every_iteration_equals_the_reference(batch_size):
    ids, model = tiny_ids(1001), tiny_method()
    config = Phase1Config(max_iterations=21, batch_size=batch_size)
    p = cloned(model)
    expected = train_reference(p, ids, config)
    _, lines, contexts = train(model, ids, config)
    assert [line["iteration"] for line in lines] == list(range(2, 22))
    torch.testing.assert_close([line["loss"] for line in lines], expected["losses"], atol=1e-4, rtol=0)
    rates = [line["convergence_rate"] for line in lines]
    torch.testing.assert_close(rates, expected["rates"], atol=0.003, rtol=0)
    torch.testing.assert_close(contexts[1:], expected["contexts"], atol=1e-3, rtol=0)
    assert not contexts[0].any()
    sample = contexts[1:513]  # 1000 contexts are fewer than two for each of SAMPLE
    centroid = sample.mean(dim=0)
    rank = effective_rank(sample, torch.Generator())
    last = [(sample - centroid).norm().item() / 512**0.5, centroid.norm().item(), rank]
    assert [lines[-1][name] for name in ("dispersion", "centroid", "effective_rank")] == pytest.approx(
        last, abs=1e-4
    )
    trained = cloned(model)
    for name, value in p.items():  # only the block's weights have changed
        torch.testing.assert_close(trained[name], value, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize(
    "changes", [{"stop_rate": 0.3}, {"plateau_rate": 0.05, "plateau_gain": 0.5}, {"max_iterations": 3}]
)
def test_phase_1_stops_when_the_reference_does(changes):
    ids, model = tiny_ids(601), tiny_method()
    config = Phase1Config(**{"max_iterations": 40, "convergence_threshold": 0.3, **changes})
    expected = train_reference(cloned(model), ids, config)
    result, *_ = train(model, ids, config)
    assert (result.iterations, result.stop_reason) == (expected["iterations"], expected["stop_reason"])


def test_a_plateau_is_two_stalls_in_a_row():
    rule = StoppingRule(Phase1Config())
    reasons = [rule.update(rate) for rate in (0.51, 0.515, 0.60, 0.605, 0.606)]
    assert reasons == [None, None, None, None, "plateau"]


@pytest.mark.parametrize("clip_norm", [1e9, 1e-3])
@pytest.mark.parametrize("kind", [ContextBlock, GatedBlock])
def test_all_parameters_of_any_block_get_the_clipped_gradients_of_autograd(kind, clip_norm):
    """The batches have 150, 150 and 1 positions."""
    torch.manual_seed(0)
    block, x = kind(16, 24).double(), torch.randn(50, 24, dtype=torch.float64)
    tokens = torch.randint(0, 50, (301,))
    contexts = torch.randn(302, 16, dtype=torch.float64)
    contexts[0] = 0
    losses, made = [], []
    for start in (0, 150, 300):
        rows = x[tokens[start : start + 150]]
        made.append(block(contexts[start : start + len(rows)], project_inputs(block, rows)))
        losses.append(reference.dispersion_loss(made[-1], 0.1))
    expected = torch.autograd.grad(sum(losses) / 3, [*block.parameters()])
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
    scale = min(1, clip_norm / (norm + 1e-6))

    config = Phase1Config(batch_size=150, noise_std=0.0, clip_norm=clip_norm)
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-9)
    given = block, optimizer, contexts, x, tokens, config, torch.Generator()
    loss, *_ = train_iteration(*given, Objective(lambda batch: oacd_loss(batch, 0.1), (x, tokens)))
    assert loss == pytest.approx(sum(losses).item() / 3)
    torch.testing.assert_close(contexts[1:], torch.cat(made).detach())
    for (name, weight), gradient in zip(block.named_parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, scale * gradient, msg=name)
        assert gradient.any(), name


def test_an_untrained_block_is_still_initialized():
    model = tiny_method()
    before = model.context_block.linear.weight.clone()
    result, lines, contexts = train(model, tiny_ids(50), Phase1Config(max_iterations=0, weight_std=0.01))
    assert (result.stop_reason, result.iterations, lines, contexts) == ("untrained", 0, [], None)
    torch.testing.assert_close(model.context_block.linear.weight, before / 10)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"initial_std": 1e38}, "iteration 2: "),
        ({"learning_rate": 1e12}, r"iteration \d: the loss is nan"),
        ({"learning_rate": 1e16}, r"iteration \d: linear\.weight is not finite"),
    ],
)
def test_divergence_raises_and_listeners_get_only_finite_numbers(changes, cause, monkeypatch):
    heard = []
    monkeypatch.setattr(Heard, "after_round", lambda callback, state, metric: heard.append(metric))
    with pytest.raises(Diverged, match=rf"diverged in {cause}.*; lower phase1\.learning_rate"):
        train(tiny_method(), tiny_ids(401), Phase1Config(max_iterations=8, batch_size=150, **changes))
    assert json.dumps(heard, allow_nan=False)


class Recording(nn.Module):
    """An objective that has one weight and records its arguments."""

    def __init__(self):
        super().__init__()
        self.scale, self.given = nn.Parameter(torch.ones(())), []

    def forward(self, next_embeddings, previous, contexts, *, embeddings):
        tensors = (contexts, previous, embeddings, next_embeddings)
        self.given.append([tensor.detach().clone() for tensor in tensors])
        return (self.scale * contexts - embeddings[:, :16]).square().mean()


def test_an_objective_gets_the_vectors_of_its_positions_and_its_weights_are_trained():
    """Train for two iterations with batches of 150, 150 and 1 positions."""
    ids, model, objective = tiny_ids(302), tiny_method(), Recording()
    read, following = distinct_rows(model, ids[:-1]), distinct_rows(model, ids[1:])
    config = Phase1Config(max_iterations=3, batch_size=150, noise_std=0.0)
    generator = torch.Generator().manual_seed(7)
    model.set_phase(1)
    block, x = model.context_block, model.embed(ids)
    _, last = train_context_block(block, *read, WIDTH, config, generator, objective, next_tokens=following)
    batches = [objective.given[:3], objective.given[3:]]
    first, second = ([torch.cat(parts) for parts in zip(*given, strict=True)] for given in batches)
    for _, _, embeddings, next_embeddings in (first, second):
        torch.testing.assert_close(embeddings, x[:-1])
        torch.testing.assert_close(next_embeddings, x[1:])
    torch.testing.assert_close(second[1], torch.cat([torch.zeros(1, 16), first[0][:-1]]))
    torch.testing.assert_close(last[1:], second[0])
    assert objective.scale.item() != 1
