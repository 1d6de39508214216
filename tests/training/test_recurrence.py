import pytest
import straight_line
import torch
from conftest import TINY, tiny_ids, tiny_model

from ctxkv_lib.config import Phase1Config
from ctxkv_lib.errors import UserError
from ctxkv_lib.training import recurrence
from ctxkv_lib.training.phase1 import train_context_block
from ctxkv_lib.training.recurrence import exact_contexts, stream_contexts


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
def test_exact_contexts_equal_one_by_one(trained, monkeypatch, count):
    monkeypatch.setattr(recurrence, "SEGMENT", 32)
    monkeypatch.setattr(recurrence, "FIRST_BURN_IN", 2)
    half, tokens = rows_of(trained, tiny_ids(count, seed=count))
    contexts, error = exact_contexts(trained.context_block, half, tokens, tolerance=1e-6)
    plain = one_by_one(trained, half[tokens])
    torch.testing.assert_close(contexts[1:], plain, atol=1e-5, rtol=0)
    assert error <= 1e-6
    assert contexts[0].eq(0).all()


def test_fresh_tokens_begin_again_from_nothing(trained, monkeypatch):
    monkeypatch.setattr(recurrence, "SEGMENT", 32)
    half, tokens = rows_of(trained, tiny_ids(100))
    fresh = torch.zeros(100, dtype=torch.bool)
    fresh[[0, 17, 64]] = True
    contexts, _ = exact_contexts(trained.context_block, half, tokens, tolerance=1e-6, fresh=fresh)
    for part, read in zip(tokens.tensor_split([17, 64]), contexts[1:].tensor_split([17, 64]), strict=True):
        torch.testing.assert_close(read, one_by_one(trained, half[part]), atol=1e-5, rtol=0)


def test_the_model_reads_as_the_recipe_does(trained):
    ids = tiny_ids(40)
    p = {name: value.clone() for name, value in trained.state_dict().items()}
    plain = straight_line.sequential_contexts(p, trained.wte.weight, ids)
    read = one_by_one(trained, trained.context_block.project_tokens(trained.embed(ids)))
    torch.testing.assert_close(read, plain, atol=1e-5, rtol=0)


def test_a_block_that_never_forgets_is_refused(trained, monkeypatch):
    monkeypatch.setattr(recurrence, "SEGMENT", 32)
    monkeypatch.setattr(recurrence, "FIRST_BURN_IN", 1)
    monkeypatch.setattr(recurrence, "LAST_BURN_IN", 8)
    half, tokens = rows_of(trained, tiny_ids(200))
    chaotic = tiny_model().context_block.requires_grad_(False)
    chaotic.linear.weight.mul_(30)
    with pytest.raises(UserError, match="does not forget its start"):
        exact_contexts(chaotic, half, tokens, tolerance=1e-6)


@pytest.mark.parametrize("pass_rows", [7, 1000])
def test_seed_contexts_are_one_pass_or_a_few(trained, monkeypatch, pass_rows):
    monkeypatch.setattr(recurrence, "PASS_ROWS", pass_rows)
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
