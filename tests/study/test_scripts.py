"""Tests of the study's scripts (training, search, evidence, caches and speed) with preset `ci`."""

import evidence
import ngram_caches
import numpy as np
import pytest
import search
import speed
import torch
import train
from tables import DISTANCES, TOP, cells_of

import ctxkv_lib as ctxkv

RESULTS = TOP / "notebooks" / "study" / "results"
SMALL = {"phase1.max_iterations": 2, "phase2.max_epochs": 1}
SPLITS = {"data.validation_samples": 3, "data.test_samples": 2}
VARIANTS = {
    "exact": {**train.EXACT, **SMALL, **SPLITS},
    "predictive": {**train.CHUNKED, **SMALL, **SPLITS, "block": "plugins:PredictiveBlock", "block.epochs": 1},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train two variants with two seeds. Return the runs by name, size and seed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTXKV_RUNS", str(tmp_path_factory.mktemp("study")))
        runs = train.train(VARIANTS, [2], [1, 2], "ci")
        assert train.train(VARIANTS, [2], [1, 2], "ci") == runs  # finished runs are reused
    return runs


def test_each_variant_is_trained_with_each_seed(trained):
    assert [*trained] == [(name, 2, seed) for seed in (1, 2) for name in VARIANTS]
    for (name, _, seed), run in trained.items():
        assert run.config == train.configure(VARIANTS[name], 2, seed, "ci")


def test_variants_train_as_many_weights_as_the_kept_rows_say():
    for part, (sizes, variants) in train.PARTS.items():
        if not (RESULTS / part / "sweep.json").is_file():  # not trained yet
            continue
        kept = {name: cells[0].get("trained") for (name, _), cells in cells_of(f"{part}/sweep").items()}
        for name, variant in variants.items():
            found = ctxkv.describe(train.configure(variant, sizes[0], 42))["parameters"]["trainable_phase2"]
            if kept.get(name):
                assert found == pytest.approx(kept[name], rel=1e-5), (part, name)


def test_a_search_keeps_the_best_value_of_one_axis_after_the_other():
    best = dict(zip(search.AXES, (0.001, 8, 1.0, 0.2), strict=True))
    tried = []

    def val_ppl(settings):
        tried.append(tuple(settings.values()))
        return sum(settings[axis] != value for axis, value in best.items())

    assert search.search(val_ppl) == best
    assert len(set(tried)) == 7
    tuned = ctxkv.build_config("offline", "tuned").phase2
    assert [tuned.learning_rate, tuned.max_epochs, tuned.weight_decay] == [*search.START.values()][:3]


def test_only_slots_from_a_distance_on_take_other_contexts(trained):
    run = ctxkv.open_run(trained["exact", 2, 1])
    model, cache = run.model.eval(), run.streams["val"]
    found = evidence.loss_saved(model, cache, torch.tensor([0, len(cache) // 2]))
    first = model.window.offsets[-1]
    positions = torch.arange(first, len(cache), evidence.EVERY)
    assert sum(found["tokens"]) == len(positions)
    with torch.no_grad():
        losses = torch.cat([model.scores(batch)[0] for batch in model.batches(cache, positions, 256)])
    mean = np.average(found["losses"], weights=found["tokens"])
    assert mean == pytest.approx(1000 * losses.mean().item(), abs=1)
    beyond = [str(distance) for distance in DISTANCES[:-1] if distance > first]
    assert all(rise == 0 for distance in beyond for rise in found["rises"][distance])
    assert any(rise != 0 for rise in found["rises"]["1"])


def test_tokens_are_held_as_well_as_the_nearest_slot_that_read_them_tells():
    decoded = [{"distance": 0, "r2": 1.0}, {"distance": 1, "r2": 0.5}, {"distance": 2, "r2": -0.1}]
    r2 = evidence.held([0, 2, 5], decoded)  # slots 0, 2, 2, 2, 5 hold tokens 1 to 5
    assert r2[:3] == pytest.approx([0.5, (1 + 0.5 + 0) / 3, (1 + 0.5 + 0 + 0 + 0) / 5])


def test_a_cache_counts_what_followed_the_same_history():
    ids = np.array([7, 8, 7, 9, 7, 8, 7])
    found = ngram_caches.recent_shares(ids, 4, 2)
    expected = [np.nan, np.nan, 0, 1, 1 / 2, 1]  # after 7, 8, 7, 9, 7, 8
    np.testing.assert_allclose(found[[0, 1, 2, 4, 5]], np.array(expected)[[0, 1, 2, 4, 5]])
    assert ngram_caches.recent_shares(ids, 2)[1:4].tolist() == [1 / 2, 0, 1 / 2]
    streams = {"val": np.full(6, 0.1), "test": np.full(6, 0.2)}
    without, mixed = ngram_caches.with_caches(streams, {"val": [found], "test": [np.full(6, np.nan)]})
    assert without == streams
    assert np.log(mixed["val"]).sum() > np.log(streams["val"]).sum()
    assert mixed["val"][0] == streams["val"][0]  # the cache has no prediction here
    assert mixed["test"].tolist() == streams["test"].tolist()


def test_caches_and_the_text_of_the_token_table_improve_ngrams():
    rows = ngram_caches.ngram_rows(3, "ci", validation_samples=2, test_samples=2)
    ppls = [rows[f"kneser_ney{name}"]["val_ppl"] for name in ("", "_cache", "_caches", "_table_caches")]
    assert ppls == sorted(ppls, reverse=True)
    assert {len(row["test_conversations"]) for row in rows.values()} == {2}


@pytest.mark.slow
def test_the_package_is_timed_beside_the_reference_and_a_step_beside_its_products(capsys, monkeypatch):
    for name, number in {"ROUNDS": 1, "READ": 50, "ITERATIONS": 2}.items():
        monkeypatch.setattr(speed, name, number)
    speed.main(2, "ci")
    timed = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    first = timed.index("Phase 1")
    assert timed[first : first + 3] == ["Phase 1", "Phase 2, an epoch", "reading"]
    assert timed[first + 4 : first + 7] == ["head", "layer", "step"]
