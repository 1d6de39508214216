"""Exact contexts equal the recurrence for any block, and parallel passes equal the original's passes."""

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_method
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lib.method import contexts as method
from ctxkv_lib.method import reference
from ctxkv_lib.method.config import Phase1Config
from ctxkv_lib.method.contexts import contexts_by_passes, distinct_rows, exact_contexts
from ctxkv_lib.method.oacd import train_context_block
from ctxkv_lib.method.tuned import StructuredBlock

WIDTH = TINY["context_dim"]


@torch.no_grad()
def one_by_one(block, projected, before):
    """Compute contexts one by one, in a plain loop. The first row is `before`."""
    contexts = [before[None]]
    for inputs in projected:
        contexts.append(block(contexts[-1], inputs[None]))
    return torch.cat(contexts)


def model_with(init):
    model, ids = tiny_method(), tiny_ids(1200)
    rows = distinct_rows(model, ids)
    if init == "trained":
        model.set_phase(1)
        config = Phase1Config(max_iterations=20, batch_size=300)
        train_context_block(model.context_block, *rows, WIDTH, config, torch.Generator().manual_seed(1))
    elif init == "means":
        settings = StructuredBlock.Settings(longest_mean=40.0)
        model.context_block = StructuredBlock(WIDTH, TINY["hidden_size"], settings)
        model.context_block.init_weights(*rows, Phase1Config())
    else:
        model.context_block.init_weights(*rows, Phase1Config(weight_std=init))
    return model.requires_grad_(False)


@pytest.mark.parametrize("init", ["trained", "means", 0.1, 0.01])
@pytest.mark.parametrize("count", [1, 2, 127, 129, 3001])
def test_exact_contexts_equal_the_recurrence_within_the_tolerance(init, count):
    # Some untrained blocks amplify rounding errors fifty times, so the test uses float64.
    model = model_with(init).double()
    ids = tiny_ids(count, seed=count)
    embeddings, tokens = distinct_rows(model, ids)
    block, zeros = model.context_block, torch.zeros(WIDTH, dtype=torch.float64)
    contexts = exact_contexts(block, block.project_inputs(embeddings), tokens, zeros, 1e-5)
    expected = reference.exact_contexts(model.state_dict(), model.wte.weight, ids)
    torch.testing.assert_close(contexts[1:], expected, atol=1e-5, rtol=0)
    assert contexts[0].eq(0).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_stream_may_be_read_part_by_part(data):
    count = data.draw(st.integers(1, 700), "count")
    cuts = sorted(data.draw(st.sets(st.integers(1, count), max_size=3), "cuts") | {count})
    model = model_with(data.draw(st.sampled_from([0.1, 0.03, 0.01]), "std")).double()
    embeddings, tokens = distinct_rows(model, tiny_ids(count, seed=count))
    block, projected = model.context_block, model.context_block.project_inputs(embeddings)
    before = torch.randn(WIDTH, generator=torch.Generator().manual_seed(count), dtype=projected.dtype)
    parts = [before[None]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "SEGMENTS", data.draw(st.integers(1, 40), "segments"))
        patch.setattr(method, "SEGMENT", data.draw(st.integers(1, 40), "segment"))
        for start, stop in zip([0, *cuts], cuts, strict=False):
            made = exact_contexts(block, projected, tokens[start:stop], parts[-1][-1], 1e-9)
            parts.append(made[1:])
    expected = one_by_one(block, projected[tokens], before)
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-8, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "block", [lambda c, x: c + x, lambda c, x: (3.8 + 0.2 * x.sigmoid()) * c * (1 - c)], ids=["sum", "chaos"]
)
def test_a_block_that_does_not_forget_costs_no_more_steps_than_tokens(block):
    projected, tokens, steps = torch.randn(20, WIDTH, dtype=torch.float64), tiny_ids(1001) % 20, []

    def counted(contexts, inputs):
        steps.append(len(contexts))
        return block(contexts, inputs)

    before = torch.rand(WIDTH, dtype=torch.float64)
    contexts = exact_contexts(counted, projected, tokens, before, 1e-9)
    torch.testing.assert_close(contexts, one_by_one(block, projected[tokens], before), atol=1e-9, rtol=0)
    assert len(steps) <= 1024


@pytest.mark.parametrize("rows", [7, 1000])
def test_parallel_passes_equal_those_of_the_original(monkeypatch, rows):
    monkeypatch.setattr(method, "PASS_ROWS", rows)
    model, ids, config = model_with("trained"), tiny_ids(50), Phase1Config(context_method="passes")
    embeddings, tokens = distinct_rows(model, ids)
    block, projected = model.context_block, model.context_block.project_inputs(embeddings)
    weights = (model.state_dict(), model.wte.weight)
    contexts = torch.randn(51, WIDTH)
    contexts[0] = 0  # the context before position 0 is always the zero vector
    expected = reference.parallel_pass(*weights, ids, contexts[1:])
    found = contexts_by_passes(block, projected, tokens, WIDTH, config, torch.Generator(), contexts)
    torch.testing.assert_close(found[1:], expected, atol=1e-5, rtol=0)

    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    found = contexts_by_passes(block, projected, tokens, WIDTH, config, generators[0])
    expected = reference.validation_contexts(*weights, ids, 3, config.initial_std, generators[1])
    torch.testing.assert_close(found[1:], expected, atol=1e-5, rtol=0)
    assert found[0].eq(0).all()
