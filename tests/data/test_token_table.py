"""Token tables: where they come from, and what they contain."""

import math
from collections import Counter
from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch
from safetensors.torch import save

from ctxkv_lib.data import cooccurrence, token_table
from ctxkv_lib.data.config import DataConfig
from ctxkv_lib.data.cooccurrence import NOISE, count_pairs, positive_pmi, table_of, token_vectors
from ctxkv_lib.data.hub import GPT2
from ctxkv_lib.data.token_table import load_table
from ctxkv_lib.data.tokens import TokenStream
from ctxkv_lib.errors import UserError

pytestmark = pytest.mark.usefixtures("own_store")

WEIGHTS = (*GPT2, "model.safetensors")
RANDOM = DataConfig(table="random")
each_kind = pytest.mark.parametrize("neighbours", ["around", "sides"])


@pytest.fixture
def small_vocabulary(monkeypatch):
    monkeypatch.setattr(token_table, "GPT2_VOCAB_SIZE", 1000)
    monkeypatch.setattr(token_table, "GPT2_WIDTH", 64)


def _checkpoint():
    wte = torch.randn(1000, 64, generator=torch.Generator().manual_seed(1))
    return save({"h.0.weight": torch.zeros(50, 50), "wte.weight": wte, "xtra": torch.zeros(50)}), wte


def test_gpt2_table_must_have_the_width_of_the_model():
    with pytest.raises(UserError, match=r"is 64, allowed with data\.table=gpt2: 768; set model\.hidden"):
        load_table(DataConfig(), 64, seed=0)


@pytest.mark.usefixtures("small_vocabulary")
def test_gpt2_table_is_read_from_the_whole_file_which_stays_cached(hub, own_store):
    hub.files[WEIGHTS], wte = _checkpoint()
    first = load_table(DataConfig(), 64, seed=0)
    assert first.dtype == torch.float32
    assert torch.equal(first, wte)
    hub.status = 500
    assert torch.equal(load_table(DataConfig(), 64, seed=1), wte)
    assert not own_store.exists()  # the package keeps no copy of its own


@pytest.mark.usefixtures("small_vocabulary")
@pytest.mark.parametrize(
    "body",
    [
        _checkpoint()[0][: len(_checkpoint()[0]) // 3],
        save({"other.weight": torch.zeros(1000, 64)}),
    ],
)
def test_a_damaged_checkpoint_is_refused(hub, body):
    hub.files[WEIGHTS] = body
    with pytest.raises(UserError, match=r"model\.safetensors is damaged \(.*\); delete it and run again"):
        load_table(DataConfig(), 64, seed=0)


@pytest.mark.usefixtures("small_vocabulary")
def test_a_random_table_depends_on_the_seed_and_its_scale_on_row_length():
    first, again, other = (load_table(RANDOM, 64, seed) for seed in (1, 1, 2))
    assert first.shape == (1000, 64)
    assert first.norm(dim=1).mean().item() == pytest.approx(1, rel=0.02)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    scaled = load_table(replace(RANDOM, row_length=0.5), 64, 1)
    assert scaled.norm(dim=1).sort().values[989] == pytest.approx(0.5)  # 99% of rows are shorter
    torch.testing.assert_close(scaled, first * (scaled[0, 0] / first[0, 0]))


def _random_stream(sizes, vocabulary):
    generator = torch.Generator().manual_seed(0)
    chats = [torch.randint(vocabulary, (size,), generator=generator).tolist() for size in sizes]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return TokenStream(torch.tensor([*chain(*chats)]), torch.tensor(starts)), chats


def build_table(stream, vocab_size, hidden_size, neighbours):
    return table_of(
        **token_vectors(stream, vocab_size, hidden_size, neighbours),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
    )


@pytest.mark.parametrize("reach", [1, 4])
@pytest.mark.parametrize("block", [1, 3, 50, 1000])
def test_counts_and_pmi_equal_the_plain_loops(monkeypatch, block, reach):
    monkeypatch.setattr(cooccurrence, "_BLOCK", block)
    stream, chats = _random_stream([1, 2, 37, 5, 64], vocabulary=7)
    places = ((chat, i, j) for chat in chats for i, j in combinations(range(len(chat)), 2))
    expected = Counter((chat[i], chat[j]) for chat, i, j in places if j - i <= reach)
    found = count_pairs(stream, 7, reach)
    dense = found.to_dense()
    assert {(i, j): dense[i, j].item() for i in range(7) for j in range(7) if dense[i, j]} == dict(expected)

    total = sum(expected.values())
    before = [sum(expected[i, j] for j in range(7)) for i in range(7)]
    smoothed = [sum(expected[i, j] for i in range(7)) ** 0.75 for j in range(7)]
    pmi = positive_pmi(found).to_dense()
    for (i, j), count in expected.items():
        ratio = (count / total) / (before[i] / total * smoothed[j] / sum(smoothed))
        assert pmi[i, j].item() == pytest.approx(max(0.0, math.log(ratio)), abs=1e-5)


def _likeness(matrix, rows):
    """Return cosines between the rows of a matrix's SVD factor: U sqrt(S) if `rows`, else V sqrt(S)."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if rows else matrix.T @ matrix)
    factors = torch.nn.functional.normalize(vectors * values.clamp(min=0) ** 0.25)
    return factors @ factors.T


@each_kind
def test_token_similarities_equal_those_of_an_exact_factorisation(monkeypatch, neighbours):
    monkeypatch.setattr(cooccurrence, "NOISE", 0)
    stream, _ = _random_stream([60, 5, 70], vocabulary=12)

    def pmi(reach):
        pairs = count_pairs(stream, 12, reach).to_dense()
        return positive_pmi((pairs + pairs.T if neighbours == "around" else pairs).to_sparse()).to_dense()

    if neighbours == "around":
        expected = _likeness(pmi(4), rows=True)
    else:
        sides = [_likeness(pmi(reach), rows) for reach in (1, 2) for rows in (True, False)]
        expected = torch.stack(sides).mean(dim=0)
    table = build_table(stream, 20, 64, neighbours)[:12]
    torch.testing.assert_close(table @ table.T, expected, atol=2e-3, rtol=0)


@each_kind
@pytest.mark.parametrize("hidden_size", [8, 64, 300])
def test_seen_tokens_have_length_one_and_others_are_noise(hidden_size, neighbours):
    stream, _ = _random_stream([4000, 3000], vocabulary=250)
    table = build_table(stream, 400, hidden_size, neighbours)
    assert (table.shape, table.dtype) == ((400, hidden_size), torch.float32)
    lengths = table.norm(dim=1)
    assert lengths[:250].mean().item() == pytest.approx(1, rel=0.03)
    assert lengths[:250].min() > 2 * lengths[250:].max()
    assert lengths[250:].mean().item() == pytest.approx(NOISE, rel=0.15)
    assert len(torch.unique(table, dim=0)) == 400  # unseen tokens differ from each other, too


def test_the_vectors_have_only_tokens_that_occur():
    stream, _ = _random_stream([300], vocabulary=50)
    vectors = token_vectors(stream, 400, 64, "around")
    assert vectors["tokens"].tolist() == sorted({*stream.ids.tolist()})
    assert vectors["vectors"].shape == (len(vectors["tokens"]), 50)  # 50 tokens have a rank of 50
