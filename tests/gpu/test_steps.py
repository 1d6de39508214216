"""What a GPU is given in each step: few launches, and nothing that the CPU waits for."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from conftest import tiny_method, tiny_stream

from ctxkv_lib.errors import UserError
from ctxkv_lib.method import oacd
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.config import Phase1Config
from ctxkv_lib.method.model import ContextBlock
from ctxkv_lib.method.oacd import Phase1State, train_iteration
from ctxkv_lib.runs.caches import ReadAhead

MOST_LAUNCHES = {("published", "fp32"): 109, ("exact", "bf16"): 147, ("tuned", "bf16"): 165}
CUDA = torch.device("cuda")


@pytest.mark.parametrize(("recipe", "precision"), MOST_LAUNCHES)
def test_a_step_has_few_launches_and_waits_for_nothing(train_on, rounds, recipe, precision):
    train_on(recipe=recipe, runtime__precision=precision)
    # Not the first of an epoch, which moves its order to the GPU.
    steps = [
        step for before, step in pairwise(rounds) if before.kind == step.kind == "Phase2State.after_step"
    ]
    assert len(steps) > 4
    assert not any(step.waits for step in steps)
    assert max(step.launches for step in steps) <= MOST_LAUNCHES[recipe, precision]


def test_an_iteration_of_phase_1_waits_twice_for_many_batches(train_on, rounds):
    train_on()
    iterations = [each for each in rounds if each.kind == "Phase1State.after_round"][1:]
    assert iterations
    assert all(each.waits.total() <= 2 and each.launches < 150 for each in iterations)


@pytest.mark.parametrize("loss", [None, lambda contexts: contexts.square().mean()])
def test_batches_that_are_computed_together_keep_their_losses(monkeypatch, loss):
    """23 tokens in batches of 5: four together, and the last one of 3 by itself; or each by itself."""

    def gradients(rows):
        monkeypatch.setattr(oacd, "GROUP_ROWS", rows)
        torch.manual_seed(0)
        block = ContextBlock(16, 24).to(CUDA)
        optimizer = torch.optim.SGD(block.parameters())
        embeddings, tokens = torch.randn(7, 24).to(CUDA), torch.randint(0, 7, (23,)).to(CUDA)
        contexts, generator = torch.randn(24, 16).to(CUDA), torch.Generator("cuda").manual_seed(0)
        settings = Phase1Config(batch_size=5, noise_std=0.0, clip_norm=1e9)
        state = Phase1State({}, optimizer, contexts, generator)
        mean_loss, _ = train_iteration(block, state, embeddings, tokens, settings, loss)
        return [torch.tensor(mean_loss), contexts, *(weight.grad for weight in block.parameters())]

    for together, apart in zip(gradients(2**16), gradients(1), strict=True):
        torch.testing.assert_close(together, apart)


def test_a_cache_that_is_read_ahead_moves_without_waiting(card):
    model, held = tiny_method().to(CUDA), ReadAhead(**tiny_stream(64).tensors())
    order = torch.arange(64)
    before = Counter(card.waits)
    batches = list(held.batches(order, 16, model))
    assert card.waits == before
    expected = list(StreamCache(**held.tensors()).batches(order, 16, tiny_method()))
    for batch, wanted in zip(batches, expected, strict=True):
        assert torch.equal(batch.window.cpu(), wanted.window)


def test_a_batch_comes_back_to_the_cpu_whole():
    """A copy that does not wait would be read before it has arrived."""
    batch = tiny_stream(64).gather(torch.arange(8), tiny_method().window)
    assert torch.equal(batch.to(CUDA).to(torch.device("cpu")).window, batch.window)


@pytest.mark.parametrize("recipe", ["published", "tuned"])
def test_a_captured_step_trains_as_one_kernel_after_another(train_on, rounds, recipe):
    """Dropout draws the same either way on a real GPU; the simulated one draws by call."""
    off = {"model__attention_dropout": 0.0} if recipe == "published" else NO_DROPOUT
    eager = train_on(recipe=recipe, name="eager", **off).summary["phase2"]["epochs"]
    rounds.clear()
    captured = train_on(recipe=recipe, name="captured", runtime__cuda_graph="on", **off)
    steps = [each.launches for each in rounds if each.kind == "Phase2State.after_step"]
    assert min(steps) < 40  # gathering, copying and one graph
    for found, expected in zip(captured.summary["phase2"]["epochs"], eager, strict=True):
        assert found["val_ppl"] == pytest.approx(expected["val_ppl"], rel=1e-4)
        assert found["train_ppl"] == pytest.approx(expected["train_ppl"], rel=1e-4)


class Waiting(torch.nn.Module):
    """Attention that looks at a number, for which a GPU cannot go on."""

    def __init__(self, config):
        super().__init__()
        self.inner = torch.nn.Linear(config.context_dim, config.hidden_size)

    def forward(self, embeddings, window, present):
        return embeddings + self.inner(window[:, 0]) * (1.0 if present.any().item() else 0.0)


def test_attention_that_waits_is_refused_as_a_graph(train_on):
    with pytest.raises(UserError, match=r"cannot be captured: operation not permitted .*cuda_graph=off"):
        train_on(attention=f"{__name__}:Waiting", runtime__cuda_graph="on")


NO_DROPOUT = {
    "model__attention_dropout": 0.0,
    "attention__input_dropout": 0.0,
    "attention__layer_dropout": 0.0,
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"device": "cpu"}, "device is cpu"), ({"mixer": "own_parts:GRUMixer"}, "mixer")],
)
def test_a_graph_is_refused_where_it_cannot_be(train_on, changes, reason):
    with pytest.raises(UserError, match=f"cuda_graph is 'on', but .*{reason}"):
        train_on(runtime__cuda_graph="on", **changes)
