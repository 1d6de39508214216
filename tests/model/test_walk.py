"""The walk in lock-step against the plain loop: blocks that forget soon, slowly, never, or here and there."""

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lib.method import scan as recurrence
from ctxkv_lib.method.scan import Stream, walk

WIDTH = TINY["context_dim"]


class Counted:
    """A block that counts its steps and the rows of all of them."""

    def __init__(self, block):
        self.block, self.steps, self.rows = block, 0, 0

    def __call__(self, state, halves):
        self.steps, self.rows = self.steps + 1, self.rows + len(state)
        return self.block(state, halves)


def one_by_one(stream, before):
    """What `walk` promises, read as it says."""
    state, contexts = before[None], [before]
    for position, token in enumerate(stream.tokens.tolist()):
        if stream.begins is not None and stream.begins[position] >= 0:
            state = stream.initial[stream.begins[position]][None]
        state = stream.block(state, stream.token_half[token : token + 1])
        contexts.append(state[0])
    return torch.stack(contexts)


def fresh_block(std, dtype=torch.float32):
    """A block and its half of every token."""
    model = tiny_model().requires_grad_(False).to(dtype)
    block = model.context_block
    block.linear.weight.mul_(std / 0.1)
    return block, block.project_tokens(model.embed(torch.arange(TINY["vocab_size"])))


def walked(stream, before, tolerance):
    contexts = torch.full((len(stream.tokens) + 1, len(before)), torch.nan, dtype=before.dtype)
    contexts[0] = before
    return contexts, walk(stream, contexts, tolerance)


@pytest.fixture
def short_segments(monkeypatch):
    """All that happens on long streams happens on short ones."""
    for name, value in (("SEGMENT", 8), ("BURN_IN", 3), ("LOOK_EVERY", 3), ("TWIN_TOKENS", 20)):
        monkeypatch.setattr(recurrence, name, value)
    monkeypatch.setitem(recurrence.SEGMENTS, "cpu", 40)
    monkeypatch.setitem(recurrence.FEW, "cpu", 4)


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_walk_is_the_plain_loop(data):
    count = data.draw(st.integers(1, 700), "count")
    std = data.draw(st.sampled_from([0.1, 0.03, 0.01]), "std")
    begin = data.draw(st.sets(st.integers(0, count - 1), max_size=5), "begin")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SEGMENT", "BURN_IN", "LOOK_EVERY"):
            patch.setattr(recurrence, name, data.draw(st.integers(2, 40), name))
        patch.setitem(recurrence.SEGMENTS, "cpu", data.draw(st.integers(1, 50), "SEGMENTS"))
        patch.setitem(recurrence.FEW, "cpu", data.draw(st.integers(1, 20), "FEW"))
        block, half = fresh_block(std, torch.float64)  # fresh weights make fifty roundings of one
        begins = torch.full((count,), -1)
        begins[sorted(begin)] = torch.arange(len(begin))
        initial = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(count), dtype=half.dtype)
        stream = Stream(block, half, tiny_ids(count, seed=count), begins if begin else None, initial)
        contexts, left = walked(stream, initial[4], 1e-9)
    torch.testing.assert_close(contexts, one_by_one(stream, initial[4]), atol=1e-7, rtol=0)
    assert left <= 1e-9


@torch.no_grad()
def test_what_never_forgets_is_read_to_the_end(short_segments):
    half = torch.randn(20, WIDTH, dtype=torch.float64)
    tokens = tiny_ids(1001) % 20
    block = Counted(torch.add)
    stream = Stream(block, half, tokens)
    contexts, left = walked(stream, half[0], 1e-9)
    torch.testing.assert_close(contexts, torch.cat([half[:1], half[tokens]]).cumsum(0), atol=1e-9, rtol=0)
    assert left <= 1e-9
    assert block.steps < 2 * len(tokens)
    assert block.rows < 10 * len(tokens)


@torch.no_grad()
def test_only_what_disagrees_is_read_again(short_segments):
    """One token in the stream is remembered for good; all else is forgotten at once."""
    tokens = torch.arange(400)
    half = torch.randn(400, WIDTH)
    half[:, 0] = 0
    half[170, 0] = 1

    def block(state, halves):
        kept = torch.zeros_like(state)
        kept[:, 0] = state[:, 0]
        return kept + halves

    counted = Counted(block)
    stream = Stream(counted, half, tokens)
    contexts, left = walked(stream, half.new_zeros(WIDTH), 1e-6)
    assert torch.equal(contexts, one_by_one(Stream(block, half, tokens), half.new_zeros(WIDTH)))
    assert left == 0
    first_walk = 40 * (10 + 3)  # segments of ten tokens and what they read before
    assert counted.rows < first_walk + 2 * (400 - 170)


@torch.no_grad()
def test_rounding_above_the_tolerance_is_left_and_reported(short_segments):
    def plain(state, halves):
        return 0.8 * state + halves

    rounded = Counted(lambda state, halves: plain(state, halves) + 1e-6 * torch.randn_like(state))
    half, tokens = torch.randn(TINY["vocab_size"], WIDTH), tiny_ids(4000)
    contexts, left = walked(Stream(rounded, half, tokens), half.new_zeros(WIDTH), 1e-8)
    assert 1e-8 < left < 2e-5
    expected = one_by_one(Stream(plain, half, tokens), contexts[0])
    torch.testing.assert_close(contexts, expected, atol=2e-5, rtol=0)
    unrounded = Counted(plain)
    walked(Stream(unrounded, half, tokens), half.new_zeros(WIDTH), left)
    assert rounded.rows < 2 * unrounded.rows


@torch.no_grad()
@pytest.mark.parametrize("factor", [torch.nan, 1e30])
def test_a_block_that_is_broken_ends_the_walk_too(short_segments, factor):
    block, half = fresh_block(0.1)
    block.linear.weight.mul_(factor)
    stream = Stream(block, half * factor, tiny_ids(300))
    contexts, _ = walked(stream, half.new_zeros(WIDTH), 1e-5)
    assert contexts.shape == (301, WIDTH)


@torch.no_grad()
def test_a_block_whose_rounding_grows_without_bound_ends_the_walk_too(short_segments):
    block, half = fresh_block(3.0)
    _, left = walked(Stream(block, half, tiny_ids(600)), half.new_zeros(WIDTH), 1e-6)
    assert left > 1e-6
