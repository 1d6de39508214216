import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model
from ctxkv_lib.training.phase2 import train_attention

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.method import phase2
from ctxkv_lib.method.caches import StreamCache, load_cache, load_ids
from ctxkv_lib.method.contexts import exact_contexts
from ctxkv_lib.runs import streamed
from ctxkv_lib.runs.config import Phase1Config, Phase2Config, build_config
from ctxkv_lib.runs.settings import LARGE_STREAM
from ctxkv_lib.runs.streamed import Streamed, read_once, sampled, vocabulary_half
from ctxkv_lib.views.explore import open_run

COUNT, BATCH = 1003, 20  # positions


@pytest.fixture(params=["current", "grid"])
def streams(request, monkeypatch):
    """A model, a stream that is made when needed, and the same one with all its contexts kept."""
    monkeypatch.setattr(streamed, "STRIDE", 16)
    monkeypatch.setattr(streamed, "BLOCK_TOKENS", 112)
    monkeypatch.setattr(streamed, "POOL_BLOCKS", 3)
    model, ids = tiny_model(anchor=request.param), tiny_ids(COUNT + 1)
    with torch.no_grad():  # a block that forgets within a few tokens, as trained ones do
        model.context_block.linear.weight.mul_(0.3)
    half, beginning = vocabulary_half(model), torch.empty(101, TINY["context_dim"])
    contexts, _ = exact_contexts(model.context_block, half, ids[:-1], 1e-6)
    starts, error = read_once(model, ids, 1e-6, beginning)
    assert error <= 1e-6
    torch.testing.assert_close(beginning, contexts[:101], atol=1e-5, rtol=0)
    torch.testing.assert_close(starts, contexts[::16], atol=1e-5, rtol=0)
    made = Streamed(ids, starts, half, torch.float32)
    return model, made, StreamCache(ids.int(), contexts)


def visited(batches, kept):
    """The positions of the stream that batches read, known by their contexts."""
    own = torch.cat([batch.window[:, 0] for batch in batches])
    return torch.cdist(own, kept.contexts[1:]).argmin(dim=1)


def test_an_epoch_visits_every_position_once_with_what_is_kept_of_it(streams):
    model, made, kept = streams
    batches = list(made.epoch(1, 1, 0, BATCH, model))
    assert [len(batch.targets) for batch in batches] == [BATCH] * 50 + [3]
    positions = visited(batches, kept)
    assert sorted(positions.tolist()) == list(range(COUNT))
    expected = kept.gather(positions, model.config)
    for name in ("tokens", "window", "present", "targets"):
        found = torch.cat([getattr(batch, name) for batch in batches])
        torch.testing.assert_close(found, getattr(expected, name), atol=1e-5, rtol=0, msg=name)


def test_every_epoch_has_an_order_of_its_own_and_takes_it_up_anywhere(streams):
    model, made, kept = streams
    orders = [
        visited(made.epoch(seed, number, 0, BATCH, model), kept).tolist()
        for seed, number in ((1, 1), (1, 1), (1, 2), (2, 1))
    ]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    first = orders[0][:300]  # a pool of three blocks of 100
    assert len({position // 100 for position in first}) == 3
    assert first != sorted(first)
    for done in (20, 300, 320, 1000):
        assert visited(made.epoch(1, 1, done, BATCH, model), kept).tolist() == orders[0][done:]


def test_a_batch_comes_in_pieces(streams):
    model, made, _ = streams
    sizes = [len(batch.targets) for batch in made.epoch(1, 1, 980, BATCH, model, pieces=3)]
    assert sizes == [7, 7, 6, 3]


def test_stopped_within_an_epoch_gives_the_same_numbers(streams, tmp_path, saved_at_every_step):
    _, made, kept = streams
    config = Phase2Config(max_epochs=2, batch_size=BATCH)
    original, steps = phase2.add_gradients, []

    def train(name, stop_at=None):
        def counted(*batch):
            steps.append(1)
            if len(steps) == stop_at:
                raise KeyboardInterrupt
            return original(*batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(phase2, "add_gradients", counted)
            result = train_attention(
                tiny_model(), made, kept, config, 1, tmp_path / name, "k", lambda metric: None
            )
        return [(epoch["train_ppl"], epoch["val_ppl"]) for epoch in result.epochs]

    whole = train("whole")
    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        train("stopped", stop_at=51 + 17)
    assert train("stopped") == whole
    assert len(steps) == 2 * 51 + 1


@pytest.mark.slow
def test_a_streamed_run_is_a_run_like_any_other(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr("ctxkv_lib.runs.contexts.BEGINNING_TOKENS", 200)
    monkeypatch.setattr(streamed, "BLOCK_TOKENS", 128)
    monkeypatch.setattr(streamed, "STRIDE", 64)
    configs = {
        how: build_config("ci", samples=8, settings={**tiny_settings, "runtime.contexts": how})
        for how in ("streamed", "cached")
    }
    runs = {how: run(config, tmp_path / how) for how, config in configs.items()}
    ours, theirs = (each.summary["phase2"] for each in runs.values())
    assert ours["val_ppl"] == pytest.approx(theirs["val_ppl"], rel=0.3)
    assert ours["val_ppl"] != theirs["val_ppl"]  # another order
    caches = tmp_path / "streamed" / "caches"
    assert len(load_ids(caches, "train")) == runs["cached"].summary["train_tokens"] > 300
    beginning, whole = load_cache(caches, "train"), load_cache(tmp_path / "cached" / "caches", "train")
    assert len(beginning) == 200
    torch.testing.assert_close(beginning.contexts, whole.contexts[:201], atol=2e-5, rtol=0)
    assert len(open_run(runs["streamed"]).caches["train"]) == 200
    assert "made when needed" in runs["streamed"].summary["provenance"]["caches"]


def test_large_streams_are_streamed_where_they_can_be():
    exact = build_config("offline")
    assert not exact.is_streamed(LARGE_STREAM)
    assert exact.is_streamed(LARGE_STREAM + 1)
    assert not exact.replace({"runtime.contexts": "cached"}).is_streamed(LARGE_STREAM + 1)
    assert not exact.replace({"runtime.embedding_cache": "dense"}).is_streamed(LARGE_STREAM + 1)
    assert not build_config("colab").is_streamed(LARGE_STREAM + 1)
    with pytest.raises(UserError, match=r"needs phase1\.contexts=exact.* \(here passes, gather, contexts\)"):
        build_config("colab", settings={"runtime.contexts": "streamed"})


def test_phase_1_trains_on_even_samples_of_a_long_stream():
    ids = torch.arange(1000)
    few = Phase1Config(contexts="exact", max_tokens=350, batch_size=100)
    assert sampled(ids, few).tolist() == [*range(100), *range(450, 550), *range(900, 1000)]
    assert sampled(ids, Phase1Config(contexts="exact", max_tokens=70, batch_size=100)).tolist() == [
        *range(70)
    ]
    for whole in (
        Phase1Config(contexts="exact", max_tokens=1000, batch_size=100),
        Phase1Config(contexts="passes", max_tokens=350, batch_size=100),
    ):
        assert torch.equal(sampled(ids, whole), ids)
