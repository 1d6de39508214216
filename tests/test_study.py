"""The plug-ins and the intervals of the second study, which lie beside its protocols."""

import math
import re
from dataclasses import replace
from pathlib import Path

import continuous_cache
import evidence
import numpy as np
import page
import parts
import pytest
import scaling
import search
import torch
import torch.nn.functional as F
from conftest import SHAPES, TINY, build_config, local_experiment, tiny_ids, tiny_method, tiny_stream
from intervals import DRAWS, beside, difference, seed_shares, speaker_groups, speakers, speakers_apart
from torch import nn

import ctxkv_lib as ctxkv
from ctxkv_lib.data.settings import DataConfig
from ctxkv_lib.files import read_json
from ctxkv_lib.method.config import ModelConfig, Phase1Config
from ctxkv_lib.research.protocol import grid_points, read_protocol
from ctxkv_lib.research.sweep import identity
from ctxkv_lib.research.sweep_file import write_sweep
from ctxkv_lib.research.sweep_table import results_of, summarize
from ctxkv_lib.runs.caches import load_cache
from ctxkv_lib.runs.models import shapes
from ctxkv_lib.runs.rows import MixerModel
from ctxkv_lib.runs.run_folder import RunFolder
from ctxkv_lib.runs.testing import trained_model

STUDY = Path(__file__).parents[1] / "notebooks" / "study"


@pytest.mark.parametrize("name", ["fair", "phase1"])
def test_all_variants_train_as_many_weights(name):
    """Those of a block that the next token trains are counted, too."""
    for point in grid_points(read_protocol(STUDY / f"{name}.json"), lambda _: None):
        if point.config.data.samples == 10 and point.config.runtime.seed == 42:
            trained = shapes(point.config)[0]["trainable_phase2"]
            if "predictive" in point.variant:
                trained += sum(weight.numel() for weight in parts.GatedBlock(256, 768).parameters())
            assert trained == pytest.approx(6_301_440, rel=1e-3), point.variant


def test_a_search_keeps_the_best_of_each_axis_and_begins_with_the_settings_of_tuned():
    best = dict(zip(search.AXES, (0.001, 8, 1.0, 0.2), strict=True))
    tried = []
    while (found := search.next_settings(tried))[1]:
        tried.append((found[0], sum(found[0][axis] != value for axis, value in best.items())))
    assert found[0] == best
    assert len(tried) == len({str(settings) for settings, _ in tried}) == 7
    (tuned,) = [
        point.config
        for point in grid_points(read_protocol(STUDY / "phase1.json"))
        if (point.variant, point.config.data.samples, point.config.runtime.seed) == ("OACD", 50, 42)
    ]
    assert search.configured("contexts", search.START) == tuned.replace({"data.test_samples": 0})
    for row, plugin in (("contexts", "attention"), ("GRU", "mixer")):
        found = search.configured(row, best)
        assert found.plugins[plugin].settings["layer_dropout"] == 0.2
        assert found.phase2 == replace(tuned.phase2, learning_rate=0.001, max_epochs=8, weight_decay=1)


def test_a_gated_block_is_the_cell_of_a_gru():
    block, cell = parts.GatedBlock(8, 12), nn.GRUCell(12, 8)
    cell.weight_ih, cell.bias_ih = block.read.weight, block.read.bias
    cell.weight_hh, cell.bias_hh = block.carry.weight, block.carry.bias
    contexts, inputs = torch.randn(5, 8), torch.randn(5, 12)
    torch.testing.assert_close(block(contexts, block.project_inputs(inputs)), cell(inputs, contexts))


def gated(**shapes):
    """A model of mixer `GatedEndToEnd`, and the same in the form that attends to contexts."""
    settings = parts.GatedEndToEnd.Settings(slots="geometric", slot_bias="nearest")
    torch.manual_seed(0)
    config = ModelConfig(**{**SHAPES, **shapes})
    model = MixerModel(config, lambda config: parts.GatedEndToEnd(config, settings), TINY["vocab_size"])
    nn.init.normal_(model.wte.weight)
    served, _ = model.attention.served(model)
    model.set_phase(2)
    return model, served


def test_contexts_of_a_gated_mixer_are_those_of_a_gated_block_read_slot_by_slot():
    """Values and gradients, from the beginning of a stream."""
    model, served = gated()
    model.eval()
    served.eval()
    tokens = tiny_ids(90)
    embeddings = model.embed(tokens)
    found = model.attention(embeddings[None], 70)[0]
    context, contexts = torch.zeros(1, SHAPES["context_dim"]), []
    for row in embeddings:
        context = served.context_block(context, served.context_block.project_inputs(row[None]))
        contexts.append(context[0])
    expected = []
    for at in range(70, 90):
        places = [at - back for back in served.window.offsets]
        window = torch.stack([contexts[i] if i >= 0 else torch.zeros_like(context[0]) for i in places])
        present = torch.tensor([[i >= 0 for i in places]])
        expected.append(served.attention(embeddings[at][None], window[None], present)[0][0])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    weights = [*model.attention.parameters()]
    target = torch.randn_like(found)
    own = torch.autograd.grad((found * target).sum(), weights)
    theirs = torch.autograd.grad((torch.stack(expected) * target).sum(), weights)
    for one, other in zip(own, theirs, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_gated_mixer_reads_what_is_older_than_its_gradient_goes_back():
    model, _ = gated(interval=46)  # the last slot is 138 back
    start = parts.TRAINED_BURN_IN + 10
    embeddings = model.embed(tiny_ids(start + 4))[None].requires_grad_()
    model.eval()
    hidden = model.attention(embeddings, start)
    (gradient,) = torch.autograd.grad(hidden.square().sum(), embeddings)
    reached = gradient[0].abs().sum(dim=1) > 0
    assert not reached[:10].any()
    assert reached[10:].all()
    changed = embeddings.detach().clone()
    changed[:, :10] += 1
    assert not torch.equal(model.attention(changed, start), hidden)


def test_two_blocks_do_not_read_each_other():
    block = parts.TwoBlocks(8, 12)
    contexts, inputs = torch.randn(5, 8), block.project_inputs(torch.randn(5, 12))
    changed = contexts.clone()
    changed[:, 4:] += 1
    before, after = block(contexts, inputs), block(changed, inputs)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_a_predictive_block_learns_what_the_next_token_needs():
    """In this stream the next token is the one before the last, which an untrained block hardly keeps."""
    torch.manual_seed(0)
    tokens = [0, 1]
    draw = torch.randint(0, 6, (2000,)).tolist()
    for place in range(2, 2000):
        tokens.append(tokens[place - 2] if place % 3 else draw[place])
    stream, embeddings = torch.tensor(tokens), torch.randn(6, 16)
    block = parts.PredictiveBlock(12, 16, parts.PredictiveBlock.Settings(epochs=15, learning_rate=0.02))
    other = parts.PredictiveBlock(12, 16, block.settings)
    other.load_state_dict(block.state_dict())
    kept = {name: weight.clone() for name, weight in block.state_dict().items()}
    head = parts.NextToken(12, embeddings, stream)
    unigram = -head.log_unigram[stream].mean().item()
    block.init_weights(embeddings, stream, Phase1Config())
    assert not torch.equal(block.carry.weight, kept["carry.weight"])
    other.init_weights(embeddings, stream, Phase1Config())
    torch.testing.assert_close(other.state_dict(), block.state_dict(), rtol=0, atol=0)
    state, rows = torch.zeros(1, 12), []
    for token in embeddings[stream]:
        state = block(state, block.project_inputs(token[None]))
        rows.append(state[0])
    contexts, before = torch.stack(rows[2:]).detach(), stream[1:-1]
    design = torch.cat([contexts, torch.ones(len(contexts), 1)], dim=1)
    fitted = design @ torch.linalg.lstsq(design, embeddings[before]).solution
    explained = 1 - (embeddings[before] - fitted).var() / embeddings[before].var()
    assert unigram > 1.5  # nothing to gain from frequencies
    assert explained > 0.3


def one_row(stream):
    """Windows of a stream that is not cut into segments."""
    return [stream[None, first : first + parts.STEPS + 1] for first in range(0, len(stream) - 1, parts.STEPS)]


def test_an_autoencoding_block_learns_to_hold_what_it_read():
    torch.manual_seed(0)
    stream, embeddings = torch.randint(0, 6, (2000,)), torch.randn(6, 16)
    block = parts.AutoencodingBlock(48, 16, parts.AutoencodingBlock.Settings(15, 0.02))

    def held():
        """R² of the token before the last."""
        state, made = torch.zeros(1, 48), []
        for token in embeddings[stream]:
            state = block(state, block.project_inputs(token[None]))
            made.append(state[0])
        design, before = F.pad(torch.stack(made[1:]).detach(), (0, 1), value=1), embeddings[stream[:-1]]
        fitted = design @ torch.linalg.lstsq(design, before).solution
        return 1 - (before - fitted).var() / before.var()

    assert held() < 0.7
    block.init_weights(embeddings, stream, Phase1Config())
    assert held() > 0.8


def test_the_error_of_an_autoencoding_block_is_that_of_tokens_that_were_read():
    stream, embeddings = torch.randint(0, 6, (2 * parts.STEPS,)), torch.randn(6, 16)
    block = parts.AutoencodingBlock(4, 16, parts.AutoencodingBlock.Settings())
    decoder = nn.Linear(4, 16 * len(parts.DISTANCES))
    state, errors = torch.zeros(1, 4), []
    for place, token in enumerate(stream[:-1]):
        state = block(state, block.project_inputs(embeddings[token][None]))
        for decoded, back in zip(decoder(state).view(-1, 16), parts.DISTANCES, strict=True):
            if place >= back:
                errors.append(
                    (place // parts.STEPS, (decoded - embeddings[stream[place - back]]).square().mean())
                )
    for window, error in enumerate(block.errors(decoder, embeddings, one_row(stream))):
        torch.testing.assert_close(error, torch.stack([e for w, e in errors if w == window]).mean())


def test_an_interval_is_of_the_ratio_of_perplexities_and_holds_nothing_where_nothing_differs():
    draw = np.random.default_rng(1)
    tokens = draw.integers(10, 900, 30).astype(float)
    other = draw.normal(5, 0.5, (3, 30))
    assert difference(other[:1], other[:1], tokens) == (0, 0, 0)
    own = other[:1] + np.log(1.1)
    assert difference(own, other[:1], tokens) == pytest.approx((10, 10, 10))
    found, low, high = difference(other + draw.normal(0.02, 0.05, (3, 30)), other, tokens)
    assert low < found < high
    one, *interval = difference(other[:, :30] * 1.01, other, tokens, [0] * 30)
    assert interval[0] < one < interval[1]  # conversations of one group leave the spread over seeds


def test_the_same_seeds_are_compared_in_pairs():
    """What seeds have in common is in neither the difference nor its interval."""
    tokens, levels = np.array([1.0, 3.0]), np.array([[0.0, 0.0], [3.0, 3.0], [9.0, 9.0]])
    base = levels + 2
    assert difference(base + np.log(1.2), base, tokens) == pytest.approx((20, 20, 20))
    change, low, high = difference(base + np.log([1.1, 1.3]), base, tokens)
    assert change == pytest.approx(100 * np.expm1(np.log([1.1, 1.3]) @ [0.25, 0.75]))
    assert (low, high) == pytest.approx((10, 30))  # both draws of one conversation
    _, low, high = difference(base, base[:1], tokens)
    assert low < -99
    assert high > 1e4


def test_means_over_seeds_have_the_t_distribution_of_so_many_seeds():
    draw = np.random.default_rng(3)
    for count, quantile in ((3, 4.303), (4, 3.182)):
        values = draw.normal(7, 2, count)
        shares = seed_shares(draw, count, 4 * DRAWS)
        np.testing.assert_allclose(shares.sum(axis=1), 1)
        t = (shares @ values - values.mean()) / (values.std(ddof=1) / np.sqrt(count))
        assert np.percentile(t, (2.5, 97.5)) == pytest.approx((-quantile, quantile), rel=0.05)
    assert (seed_shares(draw, 1, 5) == 1).all()


def test_a_row_meets_another_where_it_stays_lower_whatever_the_conversations_are():
    level = np.linspace(3, 7, 10)[None]
    other = {10: level, 100: level, 1000: level}
    lines = {
        "other": other,
        "crosses": {10: level + 0.5, 1000: level - 0.5},
        "again": {10: level - 0.5, 100: level + 0.1, 1000: level - 0.1},
        "lower": dict.fromkeys(other, level - 0.1),
        "higher": dict.fromkeys(other, level + 0.1),
    }
    losses = scaling.drawn(lines, 50)
    expected = {"crosses": 100, "again": 10**2.5, "lower": 10, "higher": np.inf}
    for name, tokens in expected.items():
        assert scaling.crossing(losses, name, "other") == pytest.approx((tokens,) * 3), name
    assert np.ptp(losses["other"][10]) > 0.5


def test_a_crossing_has_the_spread_over_conversations_and_seeds():
    draw = np.random.default_rng(0)
    rows = {
        name: {
            10: draw.normal(5 + add, 0.2, (1, 10)) + seeds,
            1000: draw.normal(5 - add, 0.2, (1, 10)) + seeds,
        }
        for name, add, seeds in (("own", 0.5, np.array([[0], [0.05], [0.1]])), ("other", 0.0, 0.0))
    }
    tokens, low, high = scaling.crossing(scaling.drawn(rows, 400), "own", "other")
    assert 10 < low < tokens < high < 1000


def test_rows_are_compared_by_the_losses_of_their_conversations():
    cells = [
        {"samples": 10, "variant": name, "seed": 1, "test_conversations": [2.0 + add, 3.0 + add]}
        for name, add in (("base", 0.0), ("other", 0.1))
    ]
    rows = [{"samples": 10, "variant": name, "seeds": [1]} for name in ("base", "other")]
    ngrams = {"10": {"kneser_ney": {"test_conversations": [1.9, 2.9]}}}
    found = beside({"cells": cells, "rows": rows, "ngrams": ngrams}, "base")
    assert found == [
        ["10", "other", "+10.5%", *["+10.5% to +10.5%"] * 2, "+10.5%, +10.5% to +10.5% (1)"],
        ["10", "kneser_ney", "-9.5%", *["-9.5% to -9.5%"] * 2, "-9.5%, -9.5% to -9.5% (1)"],
    ]


def test_conversations_that_share_a_speaker_are_one_group_and_speakers_apart_in_no_training_one():
    groups = speaker_groups(50)
    assert (len(groups), len(set(groups))) == (50, 20)
    counts = [speakers_apart(50, samples).sum() for samples in (10, 50, 200)]
    assert counts == [31, 16, 4]  # who speaks in more conversations meets more of the test
    trained = speakers("train", DataConfig(samples=50))
    apart = np.flatnonzero(speakers_apart(50, 50))
    test = [speakers("test", DataConfig(test_samples=50))[place] for place in apart]
    assert all(own.isdisjoint(other) for own in test for other in trained)


def test_only_slots_from_a_distance_on_take_other_contexts(monkeypatch):
    """Slots lie 0, 3, 6 and 9 tokens back; what a position loses is computed here one position at a time."""
    monkeypatch.setattr(evidence, "DISTANCES", (1, 2, 4, 7, 10))  # no slot lies between 1 and 2
    monkeypatch.setattr(evidence, "EVERY", 2)
    monkeypatch.setattr(evidence, "BATCH", 5)
    model, cache = tiny_method().eval(), tiny_stream(60)
    found = evidence.loss_saved(model, cache, torch.tensor([0, 20, 41]))
    positions = list(range(9, 60, 2))
    conversations = [
        [at for at in positions if low <= at < high] for low, high in ((0, 20), (20, 41), (41, 60))
    ]
    assert found["tokens"] == [len(each) for each in conversations]
    rises = {**found["rises"], "10": [0, 0, 0]}  # beyond all slots
    for distance in (1, 4, 7, 10):
        for place, members in enumerate(conversations):
            losses = []
            for at in members:
                away = 9 + (at - 9 + 25) % 51
                rows = [(away if 3 * slot >= distance else at) - 3 * slot + 1 for slot in range(4)]
                batch = cache.gather(torch.tensor([at]), model.window)
                hidden, _ = replace(batch, window=cache.contexts[rows][None]).attend(model)
                losses.append(model.losses(hidden, batch.tokens, batch.targets)[0].item())
            measured = found["losses"][place] + rises[str(distance)][place]
            assert measured == pytest.approx(1000 * np.mean(losses), abs=0.6)
    run = {"recipe": "exact", "samples": 50, **found}
    near, same, *_, last = evidence.used({"tokens": found["tokens"], "runs": [run]}, "exact")
    assert near == same != last


def test_a_token_is_decoded_from_the_nearest_slot_that_read_it(monkeypatch):
    monkeypatch.setattr(evidence, "DISTANCES", (1, 3, 6))
    decoded = [{"distance": at, "r2": r2} for at, r2 in enumerate((0.9, 0.3, -0.1))]
    assert evidence.held([0, 2, 5], decoded) == pytest.approx([(0.3 + 0.9) / 2, (0.3 + 0 + 0.9) / 3])


def test_the_window_votes_for_the_next_token(monkeypatch):
    """The same one position at a time; blocks of 4 positions and a window of 6 do not change it."""
    monkeypatch.setattr("ctxkv_lib.hf.copying.COMPARED_AT_ONCE", 4)
    torch.manual_seed(0)
    hidden, ids = torch.randn(15, 5), torch.randint(0, 3, (16,))
    found = continuous_cache.votes(hidden, ids, 6, (0, 3))
    assert found[:, 0].tolist() == [0, 0]
    for row, factor in enumerate((0, 3)):
        for at in range(1, 15):
            window = range(max(0, at - 6), at)
            weight = {
                i: math.exp(factor * torch.cosine_similarity(hidden[at], hidden[i], dim=0)) for i in window
            }
            agreeing = sum(weight[i] for i in window if ids[i + 1] == ids[at + 1])
            assert found[row, at].item() == pytest.approx(agreeing / sum(weight.values()), abs=1e-6)


def test_caches_are_chosen_on_validation_and_leave_the_rest_of_a_run_as_it_is(finished_run):
    found = continuous_cache.measured(finished_run.path, "cache")
    assert (found["variant"], found["samples"], found["seed"]) == ("exact", 8, 42)
    rows, summary = found["rows"], finished_run.summary
    assert list(rows) == ["model", *continuous_cache.KINDS, *continuous_cache.WITH_FOUR.values()]
    assert rows["model"]["val_ppl"] == pytest.approx(summary["phase2"]["val_ppl"], rel=1e-2)  # bf16 or not
    assert rows["model"]["test_ppl"] == pytest.approx(summary["test"]["ppl"], rel=1e-4)
    for kind in continuous_cache.KINDS:
        assert rows[kind]["val_ppl"] < rows["model"]["val_ppl"]
    for base, kind in continuous_cache.WITH_FOUR.items():
        assert rows[kind]["val_ppl"] < rows[base]["val_ppl"]
        assert len(rows[kind]["weights"]) == 4
    losses = [loss for _, loss in summary["test"]["conversations"]]
    assert rows["model"]["test_conversations"] == pytest.approx(losses, abs=1e-3)


def test_caches_of_a_sweeps_run_stand_beside_the_losses_of_its_results(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(continuous_cache, "RESULTS", tmp_path)
    monkeypatch.setattr(continuous_cache, "WEIGHTS", (0.1,))
    (tmp_path / "part").mkdir()
    config = finished_run.config
    named = {"variant": "mine", "samples": 8, "seed": 42, "config": identity(config), "state": "finished"}
    swept = {**named, **results_of(finished_run.summary)}
    write_sweep(tmp_path / "part" / "sweep.json", summarize({"mine": {"settings": {}}}, [swept]))
    continuous_cache.main("part", [finished_run.path])
    continuous_cache.main("part", [finished_run.path])  # measured again, it takes the earlier one's place
    (stored,) = read_json(tmp_path / "part" / "cache.json")["runs"]
    assert [*stored["rows"]] == [*continuous_cache.KINDS, *continuous_cache.WITH_FOUR.values()]
    (found,) = continuous_cache.found("part")
    assert (found["variant"], found["samples"], found["seed"]) == ("mine", 8, 42)
    assert found["rows"]["model"]["test_conversations"] == swept["test_conversations"]
    assert {name: row for name, row in found["rows"].items() if name != "model"} == stored["rows"]


def test_a_gated_mixer_is_measured_with_copying(tmp_path):
    """Its contexts are those of the model that attends to them, whose losses are the run's."""
    settings = {**local_experiment(tmp_path), "mixer": "parts:GatedEndToEnd", "mixer.slots": "geometric"}
    run = ctxkv.run(build_config("ci", samples=8, settings=settings), tmp_path / "run")
    found = continuous_cache.measured(run.path, "cache")["rows"]
    assert found["model"]["test_ppl"] == pytest.approx(run.summary["test"]["ppl"], rel=1e-3)
    assert found["model"]["val_ppl"] == pytest.approx(run.summary["phase2"]["val_ppl"], rel=1e-2)
    assert found["copying"]["val_ppl"] < found["model"]["val_ppl"]
    assert found["copying"]["val_ppl"] != found["continuous cache"]["val_ppl"]


def test_a_context_cache_compares_contexts_as_far_back_as_attention_reads(finished_run):
    config, folder = finished_run.config, RunFolder(finished_run.path)
    model = trained_model(config, folder)
    cache = load_cache(folder.caches, "val")
    found = continuous_cache.read(model, cache)
    contexts, ids = cache.contexts[1:], cache.ids.tolist()
    at, reach = len(cache) - 1, model.window.offsets[-1]
    window = range(max(0, at - reach), at)
    weights = {i: math.exp(4 * torch.cosine_similarity(contexts[at], contexts[i], dim=0)) for i in window}
    agreeing = sum(weights[i] for i in window if ids[i + 1] == ids[at + 1])
    share = continuous_cache.votes(found.keys["contexts"], found.ids, reach, (4,))[0, at]
    assert share.item() == pytest.approx(agreeing / sum(weights.values()), abs=1e-6)


def test_a_mixture_is_one_of_probabilities():
    losses = torch.tensor([0.5, 0.25, 0.25], dtype=torch.double).log().neg()
    share = torch.tensor([0.0, 1.0, 0.0], dtype=torch.double)
    mixture = continuous_cache.mixed(losses, share, 0.2).neg().exp()
    torch.testing.assert_close(mixture, torch.tensor([0.4, 0.4, 0.2], dtype=torch.double))


def test_the_pages_tables_have_what_ran_and_what_did_not_in_the_order_of_the_protocol():
    shown = page.perplexities("fair").data
    assert shown.index("contexts") < shown.index("tokens at the same slots") < shown.index("GRU")
    assert "PPL on 50 test conversations" in shown
    assert "<td>trained end to end</td>" + 5 * "<td></td>" in shown  # it has not run
    several = [row for row in page.results("fair")["rows"] if len(row["seeds"]) > 1]
    assert shown.count("\u00a0±\u00a0") == len(several) > 5
    assert page.beside_the_original().data.count("the original: ") == 4
    runs = re.findall(r"<td[^>]*>([\d.]+)\s\((\d)\)</td>", page.searched().data)
    assert sorted(runs) == sorted((f"{run['val_ppl']:.1f}", str(run["best_epoch"])) for run in search.found())
    assert "-21% (" in page.cached("cache").data
    assert "copying" in page.cached("fair", ("model", "copying")).data
    drawn = {("a", "b"): {10: (-12.3, -20.4, 1.52)}, ("a", "c"): {50: (0.04, -1, 2)}}
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page.compared(drawn, drawn).data)
    first = "-12% (-20\u00a0to\u00a01.5; -20\u00a0to\u00a01.5)"
    second = "0.0% (-1.0\u00a0to\u00a02.0; -1.0\u00a0to\u00a02.0)"
    assert cells == ["a, compared with b", first, "", "a, compared with c", "", second]
