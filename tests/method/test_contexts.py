"""Exact contexts equal the token-by-token recurrence for any block; parallel passes equal the original's."""

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model
from ctxkv_lib.hf.prefill import scan_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lib.method import contexts as method
from ctxkv_lib.method import reference
from ctxkv_lib.method.config import Phase1Config
from ctxkv_lib.method.contexts import (
    CHECK_EVERY,
    SEGMENT,
    distinct_rows,
    exact_contexts,
    stream_contexts,
)
from ctxkv_lib.method.oacd import train_context_block
from ctxkv_lib.method.tuned import StructuredBlock

WIDTH = TINY["context_dim"]


class Counted:
    """A block that counts its steps and the rows of all of them."""

    def __init__(self, block):
        self.block, self.steps, self.rows = block, 0, 0

    def __call__(self, contexts, projected):
        self.steps, self.rows = self.steps + 1, self.rows + len(contexts)
        return self.block(contexts, projected)


@torch.no_grad()
def one_by_one(block, projected, before, is_first=None):
    """Padded contexts of the plain loop."""
    contexts = [before[None]]
    for position, inputs in enumerate(projected):
        begins = is_first is not None and is_first[position]
        contexts.append(block(torch.zeros_like(before[None]) if begins else contexts[-1], inputs[None]))
    return torch.cat(contexts)


def scale(block, std):
    """Bring weights, drawn with 0.1, to another standard deviation."""
    with torch.no_grad():
        block.linear.weight.mul_(std / 0.1)


def model_with(init):
    model, ids = tiny_model(), tiny_ids(1200)
    block, rows = model.context_block, distinct_rows(model, ids)
    if init == "trained":
        model.set_phase(1)
        config, contexts = Phase1Config(max_iterations=20, batch_size=300), torch.empty(1201, WIDTH)
        train_context_block(block, *rows, config, contexts, torch.Generator().manual_seed(1))
    elif isinstance(init, dict):
        block = StructuredBlock(WIDTH, TINY["hidden_size"], StructuredBlock.Settings(**init))
        block.init_weights(*rows, Phase1Config())
        model.context_block = block
    else:
        scale(block, init)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=["trained", 0.1, 0.01, {"longest_mean": 40.0}])
def model(request):
    return model_with(request.param).double()  # some untrained blocks amplify a rounding fifty times


@pytest.fixture
def short_segments(monkeypatch):
    """What happens on long streams happens on short ones."""
    for name, value in (("SEGMENT", 8), ("CHECK_EVERY", 3), ("CPU_SEGMENTS", 40), ("GPU_SEGMENTS", 40)):
        monkeypatch.setattr(method, name, value)


@pytest.mark.parametrize("count", [1, 2, SEGMENT - 1, SEGMENT, SEGMENT + 1, 10 * SEGMENT + 3])
def test_exact_contexts_are_the_recurrence_to_the_tolerance(model, count):
    ids = tiny_ids(count, seed=count)
    embeddings, tokens = distinct_rows(model, ids)
    projected = model.context_block.project_inputs(embeddings)
    contexts, error = exact_contexts(model.context_block, projected, tokens, tolerance=1e-5)
    expected = reference.exact_contexts(model.state_dict(), model.wte.weight, ids)
    torch.testing.assert_close(contexts[1:], expected, atol=1e-5, rtol=0)
    assert contexts[0].eq(0).all()
    assert error <= 1e-5


@torch.no_grad()
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_streams_may_be_cut_continued_and_begin_anew_anywhere(data):
    count = data.draw(st.integers(1, 700), "count")
    begins = data.draw(st.sets(st.integers(0, count - 1), max_size=5), "begins")
    model = tiny_model().double()
    block = model.context_block
    scale(block, data.draw(st.sampled_from([0.1, 0.03, 0.01]), "std"))
    embeddings, tokens = distinct_rows(model, tiny_ids(count, seed=count))
    projected = block.project_inputs(embeddings)
    is_first = torch.zeros(count, dtype=torch.bool)
    is_first[sorted(begins)] = True
    before = torch.randn(WIDTH, generator=torch.Generator().manual_seed(count), dtype=projected.dtype)
    dtype = data.draw(st.sampled_from([torch.float64, torch.bfloat16]), "dtype")
    out = torch.full((count + 1, WIDTH), torch.nan, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SEGMENT", "CHECK_EVERY", "CPU_SEGMENTS", "GPU_SEGMENTS"):
            patch.setattr(method, name, data.draw(st.integers(2, 40), name))
        patch.setattr(method, "SCAN_TOKENS", data.draw(st.integers(30, 1000), "SCAN_TOKENS"))
        stream = (block, projected, tokens.to(torch.uint16), 1e-9, is_first if begins else None)
        contexts, error = exact_contexts(*stream, before=before)
        exact_contexts(*stream, out, before)
    expected = one_by_one(block, projected[tokens], before, is_first)
    torch.testing.assert_close(
        contexts, expected, atol=1e-8, rtol=0
    )  # segments of 2 tokens have many boundaries
    assert torch.equal(out, contexts.to(out.dtype))
    assert error <= 1e-9


def growing_sum(contexts, projected):
    """Never forgets."""
    return contexts + projected


def chaotic(contexts, projected):
    """Forgets nothing either, and doubles differences, those of rounding, too, every few tokens."""
    return (3.8 + 0.2 * projected.sigmoid()) * contexts * (1 - contexts)


@torch.no_grad()
@pytest.mark.parametrize("block", [growing_sum, chaotic])
def test_a_block_that_does_not_forget_costs_little_more_than_token_by_token(short_segments, block):
    projected, tokens, counted = (
        torch.randn(20, WIDTH, dtype=torch.float64),
        tiny_ids(1001) % 20,
        Counted(block),
    )
    before = torch.rand(WIDTH, dtype=torch.float64)
    contexts, error = exact_contexts(counted, projected, tokens, 1e-9, before=before)
    torch.testing.assert_close(contexts, one_by_one(block, projected[tokens], before), atol=1e-9, rtol=0)
    assert error <= 1e-9
    assert counted.steps < 1.5 * len(tokens)
    assert counted.rows < 6 * len(tokens)


@torch.no_grad()
def test_only_segments_that_started_wrong_are_computed_again(short_segments):
    """One token of the stream is remembered for good; all else is forgotten at once."""
    projected = torch.randn(400, WIDTH)
    projected[:, 0] = 0
    projected[170, 0] = 1
    first_only = torch.eye(WIDTH)[0]
    block = Counted(lambda contexts, projected: contexts * first_only + projected)
    contexts, error = exact_contexts(block, projected, torch.arange(400), 1e-6)
    assert torch.equal(contexts, one_by_one(block.block, projected, contexts[0]))
    assert error == 0
    once, checks = 400, 40 * CHECK_EVERY
    assert block.rows < once + checks + 2 * (400 - 170)


@torch.no_grad()
@pytest.mark.parametrize("factor", [torch.nan, 1e30])
def test_a_broken_block_ends_the_scan_too(short_segments, factor):
    projected = torch.randn(20, WIDTH)
    contexts, _ = exact_contexts(
        lambda contexts, projected: factor * (contexts + projected), projected, tiny_ids(300) % 20, 1e-5
    )
    assert not contexts[-1].isfinite().any()


@torch.no_grad()
def test_half_precision_is_scanned_fast_and_as_exact_as_token_by_token():
    model, tokens = tiny_model(context_dim=64, hidden_size=96).bfloat16(), tiny_ids(2000)
    block, projected = Counted(model.context_block), model.context_block.project_inputs(model.wte.weight)
    zero, everything = projected.new_zeros(1, 64), torch.ones(1, 2000, dtype=torch.bool)
    scanned = scan_rows(block, projected, tokens[None], everything, zero, 1e-5)[0]
    assert block.steps < 1000
    plain = one_by_one(model.context_block, projected[tokens], zero[0])[1:]
    exact = one_by_one(model.float().context_block, projected[tokens].float(), zero[0].float())[1:]
    assert (scanned - exact).abs().mean() < 1.2 * (plain - exact).abs().mean()


@pytest.mark.parametrize("rows", [7, 1000])
def test_parallel_passes_are_the_originals(monkeypatch, rows):
    monkeypatch.setattr(method, "PASS_ROWS", rows)
    model, ids, config = model_with("trained"), tiny_ids(50), Phase1Config(context_method="passes")
    embeddings, tokens = distinct_rows(model, ids)
    block, projected = model.context_block, model.context_block.project_inputs(embeddings)
    weights = (model.state_dict(), model.wte.weight)
    contexts = torch.randn(51, WIDTH)
    contexts[0] = 0  # the context before position 0 is always the zero vector
    expected = reference.parallel_pass(*weights, ids, contexts[1:])
    assert stream_contexts(block, projected, tokens, config, contexts, True, torch.Generator()) is None
    torch.testing.assert_close(contexts[1:], expected, atol=1e-6, rtol=0)

    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    stream_contexts(block, projected, tokens, config, contexts, False, generators[0])
    expected = reference.validation_contexts(*weights, ids, 3, config.initial_std, generators[1])
    torch.testing.assert_close(contexts[1:], expected, atol=1e-6, rtol=0)
    assert contexts[0].eq(0).all()
