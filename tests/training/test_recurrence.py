import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model

from ctxkv_lib.method import contexts as recurrence
from ctxkv_lib.method import reference as straight_line
from ctxkv_lib.method import scan as model_recurrence
from ctxkv_lib.method.contexts import exact_contexts, stream_contexts
from ctxkv_lib.method.oacd import train_context_block
from ctxkv_lib.runs.config import Phase1Config


def rows_of(model, ids):
    distinct, tokens = ids.unique(return_inverse=True)
    with torch.no_grad():
        return model.context_block.project_tokens(model.embed(distinct)), tokens


def one_by_one(model, half):
    """Contexts of the plain loop that the model itself reads with."""
    everything = torch.ones(1, len(half), dtype=torch.bool)
    return model._read(half.new_zeros(1, half.shape[1]), half[None], everything)[0]


@pytest.fixture(scope="module")
def trained():
    """A model whose ContextBlock forgets its start."""
    model = tiny_model()
    model.set_phase(1)
    ids = tiny_ids(1200)
    distinct, tokens = ids.unique(return_inverse=True)
    with torch.no_grad():
        embeddings = model.embed(distinct)
    config = Phase1Config(max_iterations=20, batch_size=300)
    generator = torch.Generator().manual_seed(1)
    contexts = torch.empty(len(tokens) + 1, TINY["context_dim"])
    train_context_block(
        model.context_block, embeddings, tokens, config, contexts, generator, lambda metric: None
    )
    return model.requires_grad_(False)


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 64, 65, 500])
@pytest.mark.parametrize("block_size", [40, 10_000])
def test_exact_contexts_equal_one_by_one(trained, monkeypatch, count, block_size):
    monkeypatch.setattr(model_recurrence, "SEGMENT", 32)
    monkeypatch.setattr(model_recurrence, "BURN_IN", 2)
    monkeypatch.setattr(recurrence, "BLOCK", block_size)
    half, tokens = rows_of(trained, tiny_ids(count, seed=count))
    contexts, error = exact_contexts(trained.context_block, half, tokens, tolerance=1e-6)
    plain = one_by_one(trained, half[tokens])
    torch.testing.assert_close(contexts[1:], plain, atol=1e-5, rtol=0)
    assert error <= 1e-6
    assert contexts[0].eq(0).all()
    out = torch.full_like(contexts, torch.nan, dtype=torch.bfloat16)
    exact_contexts(trained.context_block, half, tokens.to(torch.uint16), tolerance=1e-6, out=out)
    assert torch.equal(out, contexts.bfloat16())


@pytest.mark.parametrize("block_size", [30, 10_000])
def test_fresh_tokens_begin_again_from_nothing(trained, monkeypatch, block_size):
    monkeypatch.setattr(model_recurrence, "SEGMENT", 32)
    monkeypatch.setattr(recurrence, "BLOCK", block_size)
    half, tokens = rows_of(trained, tiny_ids(100))
    fresh = torch.zeros(100, dtype=torch.bool)
    fresh[[0, 17, 64]] = True
    contexts, _ = exact_contexts(trained.context_block, half, tokens, tolerance=1e-6, fresh=fresh)
    for part, read in zip(tokens.tensor_split([17, 64]), contexts[1:].tensor_split([17, 64]), strict=True):
        torch.testing.assert_close(read, one_by_one(trained, half[part]), atol=1e-5, rtol=0)


def test_a_part_of_a_stream_is_read_from_the_context_before_it(trained, monkeypatch):
    monkeypatch.setattr(recurrence, "BLOCK", 70)
    half, tokens = rows_of(trained, tiny_ids(300))
    whole, _ = exact_contexts(trained.context_block, half, tokens, tolerance=1e-6)
    out = torch.full((177, half.shape[1]), torch.nan, dtype=torch.bfloat16)
    for room in (None, out):
        part, _ = exact_contexts(
            trained.context_block, half, tokens[35:211], tolerance=1e-6, before=whole[35], out=room
        )
        torch.testing.assert_close(
            part, whole[35:212].to(part.dtype), atol=1e-2 if room is out else 1e-5, rtol=0
        )


def test_the_model_reads_as_the_recipe_does(trained):
    ids = tiny_ids(40)
    p = {name: value.clone() for name, value in trained.state_dict().items()}
    plain = straight_line.sequential_contexts(p, trained.wte.weight, ids)
    read = one_by_one(trained, trained.context_block.project_tokens(trained.embed(ids)))
    torch.testing.assert_close(read, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("tolerance", "lines"), [(1e-5, 0), (1e-9, 1)])
def test_rounding_above_the_tolerance_is_said(capsys, tolerance, lines):
    half, tokens = torch.randn(50, 16), tiny_ids(3000) % 50
    config = Phase1Config(contexts="exact", tolerance=tolerance)
    contexts, generator = torch.empty(3001, 16), torch.Generator()

    def block(state, halves):
        return 0.8 * state + halves + 1e-7 * torch.randn_like(state)

    error = stream_contexts(block, half, tokens, config, contexts, True, generator)
    assert (error > tolerance) == bool(lines)
    assert capsys.readouterr().err.count(f"exact to {error:.1e}, not to 1e-09 as asked for") == lines


@pytest.mark.parametrize("pass_rows", [7, 1000])
def test_seed_contexts_are_one_pass_or_a_few(trained, monkeypatch, pass_rows):
    monkeypatch.setattr(recurrence, "PART_ROWS", pass_rows)
    ids = tiny_ids(50)
    half, tokens = rows_of(trained, ids)
    p = {name: value.clone() for name, value in trained.state_dict().items()}
    config = Phase1Config(contexts="passes")
    state = torch.randn(51, half.shape[1])
    state[0] = 0  # the context before position 0 is always the zero vector
    plain = straight_line.seed_contexts(p, trained.wte.weight, ids, state[1:])
    block, settings = trained.context_block, (half, tokens, config)
    assert stream_contexts(block, *settings, state, True, torch.Generator()) is None
    torch.testing.assert_close(state[1:], plain, atol=1e-6, rtol=0)

    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    stream_contexts(block, *settings, state, False, generators[0])
    plain = straight_line.validation_contexts(
        p, trained.wte.weight, ids, 3, config.initial_std, generators[1]
    )
    torch.testing.assert_close(state[1:], plain, atol=1e-6, rtol=0)
    assert state[0].eq(0).all()
