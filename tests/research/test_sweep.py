import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import local_experiment
from test_cli import settings_of

from ctxkv_lib import experiments as experiment
from ctxkv_lib.cli import main
from ctxkv_lib.errors import Stopped, UserError
from ctxkv_lib.files import read_json
from ctxkv_lib.research import sweep as module
from ctxkv_lib.research import sweep_table
from ctxkv_lib.research.protocol import asked_for, cells_around, cells_of, read_protocol
from ctxkv_lib.research.sweep import finished_runs, sweep
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.configure import configure
from ctxkv_lib.runs.listing import list_runs
from ctxkv_lib.runs.models import shapes
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.runs.trained import load_trained
from ctxkv_lib.runs.verification import verify
from ctxkv_lib.views.study import memory_figure, sweep_figure

STUDY = Path(__file__).parents[2] / "notebooks" / "study" / "results"


@pytest.fixture
def small(tmp_path):
    """Settings of runs that take half a second."""
    return {**local_experiment(tmp_path), "phase1.max_iterations": 2, "phase2.max_epochs": 1}


def cells_in(small, variants, seeds=(1,)):
    return cells_around(build_config("ci", samples=8, settings=small), variants, seeds)


def states(outcomes):
    return [(each.cell.variant, each.cell.config.runtime.seed, each.state) for each in outcomes]


# What a sweep is asked for


def protocol_file(tmp_path, **values):
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"variants": {"plain": {}}, **values}))
    return path


def test_options_make_every_combination_small_counts_and_first_seeds_first():
    options = {
        "preset": "offline",
        "recipe": ["exact", "published"],
        "samples": [50, 10],
        "seeds": [7, 3],
        "grid": ["phase2.weight_decay=0.01, 0.3"],
    }
    cells = cells_of(asked_for(None, options, {"phase2.patience": "2"}))
    assert len(cells) == 2 * 2 * 2 * 2
    assert [cell.config.data.samples for cell in cells] == [10] * 8 + [50] * 8
    assert [cell.config.runtime.seed for cell in cells[:8]] == [7] * 4 + [3] * 4
    assert [str(cell) for cell in cells[:2]] == [
        "exact, weight_decay 0.01, 10 samples, seed 7",
        "exact, weight_decay 0.3, 10 samples, seed 7",
    ]
    assert {cell.config.phase2.weight_decay for cell in cells} == {0.01, 0.3}
    assert {cell.config.phase2.patience for cell in cells} == {2}
    assert {cell.config.recipe for cell in cells} == {"exact", "published"}


def test_a_protocol_names_variants_with_settings_of_their_own(tmp_path):
    variants = {
        "plain": {},
        "decay": {"settings": {"phase2.weight_decay": 0.3}},
        "large": {"recipe": "published", "samples": [50], "seeds": [1, 2]},
    }
    path = protocol_file(
        tmp_path, preset="offline", samples=[10], settings={"phase2.patience": 1}, variants=variants
    )
    cells = cells_of(read_protocol(path))
    assert [(c.variant, c.config.data.samples, c.config.runtime.seed) for c in cells] == [
        ("plain", 10, 42),
        ("decay", 10, 42),
        ("large", 50, 1),
        ("large", 50, 2),
    ]
    assert cells[1].config.phase2.weight_decay == 0.3
    assert {cell.config.phase2.patience for cell in cells} == {1}
    assert [cell.config.recipe for cell in cells] == ["exact", "exact", "published", "published"]


def test_all_variants_of_a_file_read_the_same_validation(small):
    """A wider window alone would ask for a longer validation text."""
    own = {"data.path": small["data.path"]}
    variants = {"narrow": {}, "wide": {"settings": {"model.interval": 40}}}
    narrow, wide = cells_of({"preset": "ci", "settings": own, "variants": variants})
    assert narrow.config.data == wide.config.data
    assert wide.config.model.interval == 40


def test_a_variant_of_a_file_has_its_recipes_own_data(small):
    """Sizes are shared; what a recipe makes of table and counts is its own."""
    own, variants = {"data.path": small["data.path"]}, {name: {"recipe": name} for name in ("exact", "tuned")}
    exact, tuned = cells_of({"preset": "offline", "settings": own, "variants": variants})
    assert (exact.config.data.neighbours, exact.config.data.unigram) == ("around", "none")
    for cell, recipe in ((exact, "exact"), (tuned, "tuned")):
        alone = configure("offline", recipe, None, {**own, "data.samples": cell.config.data.samples})
        assert cell.config.data == alone.data


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"variants": {}}, "names no variants"),
        ({"variants": []}, r"has \[\] as variants; allowed: an object"),
        ({"seed": [1]}, "has 'seed'; allowed: preset, recipe, settings, samples, seeds, variants"),
        ({"seeds": 3}, "has 3 as seeds; allowed: a list of whole numbers"),
        ({"seeds": [True]}, "allowed: a list of whole numbers"),
        ({"samples": []}, "allowed: a list of whole numbers"),
        ({"preset": 1}, "has 1 as preset; allowed: a string"),
        ({"variants": {"a": {"setting": {}}}}, "variant 'a' has 'setting'; allowed: recipe, settings"),
        ({"variants": {"a": 3}}, "variant 'a' is no object"),
        ({"variants": {"a": {"settings": {"phase2.size": 3}}}}, "Variant 'a': setting is 'phase2.size'"),
        ({"variants": {"a": {"recipe": "soup"}}}, "Variant 'a': recipe is 'soup'; allowed"),
        ({"preset": "moon"}, "preset is 'moon'"),
    ],
)
def test_a_protocol_of_another_form_is_refused_in_a_sentence(tmp_path, values, said):
    with pytest.raises(UserError, match=said):
        cells_of(read_protocol(protocol_file(tmp_path, **values)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "phase2.patience"], "is no axis; write --grid concern.field=value,value"),
        (["--grid", "phase2.patience=1,,2"], "is no axis"),
        (["--protocol", "none.json"], "none.json is not a file"),
        (["--protocol", "none.json", "--seeds", "1"], "--seeds does not go with --protocol"),
        (["--protocol", "none.json", "--set", "a.b=1"], "--set does not go with --protocol"),
        (["--preset", "offline", "--samples", "999999"], "999999"),
    ],
)
def test_bad_options_are_refused_before_anything_is_computed(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# Running it


@pytest.mark.slow
def test_a_failing_and_a_diverging_cell_are_recorded_and_the_others_go_on(small, tmp_path):
    variants = {
        "diverges": {"phase2.learning_rate": 1e30},
        "fails": {"model.interval": 5000},
        "works": {},
    }
    cells, out = cells_in(small, variants), tmp_path / "out"
    said = []
    outcomes = sweep(cells, out, out, tell=said.append)
    assert states(outcomes) == [("diverges", 1, "diverged"), ("fails", 1, "failed"), ("works", 1, "finished")]
    assert "1 of 3: diverges, 8 samples, seed 1: diverged: Phase 2 diverged in epoch 1" in said[0]
    written = read_json(out / "sweep.json")
    assert [cell["state"] for cell in written["cells"]] == ["diverged", "failed", "finished"]
    assert [row["variant"] for row in written["rows"]] == ["works", "n-grams", "n-grams and cache"]
    assert written["rows"][0]["measured"]["effective_rank"] > 0
    document = (out / "sweep.md").read_text()
    assert "3 cells: 1 diverged, 1 failed, 1 finished." in document
    assert "one context window" in document
    assert "lower phase2.learning\\_rate" in document
    assert (out / "sweep.png").is_file()

    again = sweep(cells, out, out, tell=said.append)
    assert states(again) == states(outcomes)
    assert len(said) == 4  # what failed is tried again, what diverged or is finished is not
    assert said[3].startswith("2 of 3: fails")


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_was(small, tmp_path, monkeypatch):
    cells, out = cells_in(small, {"plain": {}}, seeds=(1, 2, 3)), tmp_path / "out"
    began = []

    def counted(config, folder, listener):
        began.append(config.runtime.seed)
        if began == [1, 2]:
            raise KeyboardInterrupt
        return experiment.run(config, folder, listener)

    monkeypatch.setattr(module, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(cells, out, out)
    kept = read_json(out / "sweep.json")
    assert [cell["state"] for cell in kept["cells"]] == ["finished", "waiting", "waiting"]
    metrics = []
    outcomes = sweep(cells, out, out, metrics.append)
    assert began == [1, 2, 2, 3]
    assert {metric["run"] for metric in metrics} == {str(cell) for cell in cells[1:]}
    (runs,) = finished_runs(outcomes).values()
    (row, *_) = read_json(out / "sweep.json")["rows"]
    assert row["seeds"] == [1, 2, 3]
    ppls = [each.summary["phase2"]["val_ppl"] for each in runs]
    assert row["val_ppl"] == [float(f"{ppl:.6g}") for ppl in ppls]
    assert kept["cells"][0] == read_json(out / "sweep.json")["cells"][0]


@pytest.mark.parametrize("work", ["load_conversations", "write_text"])
def test_a_stop_outside_of_the_runs_says_its_line_too(small, tmp_path, monkeypatch, work):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, work, interrupted)
    with pytest.raises(Stopped, match="Finished stages are kept; run the cell again"):
        sweep(cells_in(small, {"plain": {}}), tmp_path / "runs", tmp_path / "out", hours=0)


def test_time_that_is_over_leaves_cells_for_the_next_call(small, tmp_path):
    cells, out = cells_in(small, {"plain": {}}, seeds=(1, 2)), tmp_path / "out"
    assert [state for *_, state in states(sweep(cells, out, out, hours=0))] == ["waiting", "waiting"]
    assert "2 cells: 2 waiting." in (out / "sweep.md").read_text()


@pytest.mark.slow
def test_a_finished_cell_keeps_its_results_and_nothing_large(small, tmp_path, capsys):
    cells, out = cells_in(small, {"plain": {}}), tmp_path / "out"
    (outcome,) = sweep(cells, out, out)
    folder = outcome.folder
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 2**20
    assert not any(folder.rglob("*.safetensors"))
    assert load_run(folder).summary == outcome.run.summary
    assert main(["report", str(folder)]) == 0
    assert [found.state for found in list_runs(out)] == ["results only"]
    checked = verify(folder)
    assert checked.intact
    assert {each.state for each in checked.artefacts if each.stage == "model"} == {"dropped"}
    with pytest.raises(UserError, match="is dropped; make it again with `ctxkv run"):
        load_trained(folder, "cpu")
    capsys.readouterr()
    again = experiment.run(cells[0].config, folder)
    assert "context_block.safetensors is dropped: phase1 is made again" in capsys.readouterr().err
    assert again.summary["phase2"]["val_ppl"] == outcome.run.summary["phase2"]["val_ppl"]
    load_trained(folder, "cpu")
    assert [found.state for found in list_runs(out)] == ["finished"]
    assert verify(folder).intact


@pytest.mark.slow
def test_what_is_to_be_kept_is_kept_and_two_names_share_a_run(small, tmp_path):
    cells, out = cells_in(small, {"a": {}, "b": {}}), tmp_path / "out"
    first, second = sweep(cells, out, out, keep=True)
    assert first.folder == second.folder
    assert first.run.summary == second.run.summary
    load_trained(first.folder, "cpu")
    sweep(cells, out, out)
    load_trained(first.folder, "cpu")


@pytest.mark.slow
def test_results_that_were_passed_on_count_where_no_files_are_to_be_kept(small, tmp_path, monkeypatch):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    sweep(cells_in(small, {"plain": {}}), tmp_path / "runs", out)
    before = read_json(out / "sweep.json")
    (written,) = before["cells"]

    def refused(*_):
        raise UserError("run again")

    monkeypatch.setattr(module, "run", refused)
    assert states(sweep(cells_in(small, {"same": {}}), elsewhere, out)) == [("same", 1, "finished")]
    again = read_json(out / "sweep.json")
    assert again["cells"] == [{**written, "variant": "same"}]
    assert again["ngrams"] == before["ngrams"]
    assert again["ngrams"]["8"]["kneser_ney"]["val_ppl"] > 1
    assert "1 finished." in (out / "sweep.md").read_text()
    other = {"plain": {}, "other": {"phase2.patience": 1}}
    found = sweep(cells_in(small, other), elsewhere, out)
    assert states(found) == [("plain", 1, "finished"), ("other", 1, "failed")]
    assert found[1].facts["error"] == "run again"
    assert states(sweep(cells_in(small, {"plain": {}}), elsewhere, out, keep=True)) == [
        ("plain", 1, "failed")
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "<<<<<<< HEAD\n" + text,
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"ngrams"', '"counted"'),
        lambda text: text.replace('"best_epoch"', '"best"'),
        lambda text: text.replace('"recipe"', '"method"'),
        lambda text: "[]",
    ],
)
def test_damaged_results_are_refused_and_left_as_they_are(small, tmp_path, capsys, damage):
    left = tmp_path / "out" / "sweep.json"
    left.parent.mkdir()
    left.write_text(damage((STUDY / "memory" / "sweep.json").read_text()))
    before = left.read_text()
    common = [*settings_of(small), "--preset", "ci", "--samples", "8"]
    assert main(["sweep", *common, "--out", str(left.parent)]) == 2
    assert f"{left} is damaged, or not what a sweep wrote; restore it" in capsys.readouterr().err
    assert left.read_text() == before
    assert [file.name for file in left.parent.iterdir() if not file.name.startswith(".")] == ["sweep.json"]


@pytest.mark.parametrize("part", sorted(path.name for path in STUDY.iterdir()))
def test_the_committed_studies_go_on_from_their_results(part, tmp_path, monkeypatch):
    """Every cell is found, with as many trained weights, none runs, and the same files are written."""
    cells, out = cells_of(read_protocol(STUDY.parent / f"{part}.json"), lambda _: None), tmp_path / part
    shutil.copytree(STUDY / part, out)
    monkeypatch.setattr(module, "run", None)
    outcomes = sweep(cells, tmp_path / "runs", out)
    assert {outcome.state for outcome in outcomes} == {"finished"}
    assert [each.facts["trained"] for each in outcomes] == [
        shapes(each.config)[0]["trainable_phase2"] for each in cells
    ]
    for name in ("sweep.json", "sweep.md"):
        assert (out / name).read_text() == (STUDY / part / name).read_text()


@pytest.mark.slow
def test_the_command_leaves_and_prints_its_table(small, tmp_path, capsys):
    common = [*settings_of(small), "--preset", "ci", "--samples", "8", "--seeds", "1", "2"]
    out = tmp_path / "out"
    places = ["--out", str(out), "--runs", str(tmp_path / "runs")]
    assert main(["sweep", *common, "--grid", "phase2.weight_decay=1", *places]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split()[:3] == ["Variant", "Samples", "Seeds"]
    assert table.count("weight_decay 1 ") == 1
    assert " ± " in table
    assert len(list((tmp_path / "runs").glob("ci-exact-8-*"))) == 2
    assert read_json(out / "sweep.json")["variants"]["weight_decay 1"]["settings"]["phase2.weight_decay"] == 1


# Its table and figure


def cell(variant, samples, seed, ppl, **more):
    return {
        "variant": variant,
        "samples": samples,
        "seed": seed,
        "state": "finished",
        "train_tokens": 1000 * samples,
        "trained": 10,
        "best_epoch": 2,
        "val_ppl": ppl,
        "test_ppl": 2 * ppl,
        "seconds": 4.0,
        "measured": {},
        "ngrams": {"kneser_ney": {"val_ppl": 5.0 * samples**-0.1, "test_ppl": 9.0}},
        "git_commit": "abc",
        **more,
    }


def test_a_power_law_is_said_of_three_sizes_and_more_and_has_its_exponent():
    points = [(tokens, 900 * tokens**-0.25) for tokens in (10, 50, 200)]
    law = sweep_table.power_law(points)
    assert law["exponent"] == pytest.approx(0.25)
    assert law["factor"] == pytest.approx(900)
    assert law["error"] == pytest.approx(0, abs=1e-9)
    assert sweep_table.power_law(points[:2] * 3) is None
    bent = sweep_table.power_law([*points, (200, 900 * 200**-0.25 * 1.21)])  # geometric mean 10% above
    x, y = np.log([10, 50, 200, 200]), np.log(900) - 0.25 * np.log([10, 50, 200, 200])
    y[-1] += np.log(1.21)
    slope = np.cov(x, y)[0, 1] / np.var(x, ddof=1)
    assert bent["exponent"] == pytest.approx(-slope)
    assert 0.01 < bent["error"] < 0.1


def results(counts, seeds=(1, 2)):
    cells = [
        cell(name, n, seed, (100 + place) * n**-0.3 * (1 + seed / 100))
        for n in counts
        for place, name in enumerate(("a", "costs $5"))
        for seed in seeds
    ]
    variants = {name: {"recipe": "exact", "settings": {}} for name in ("a", "costs $5")}
    return sweep_table.summarize(variants, cells)


def test_rows_have_mean_spread_and_n_grams_beside():
    found = results([10, 50, 200])
    document = sweep_table.sweep_document(found)
    assert "| a | 10 | 2 | 10 | 50.9 ± 0.4 | 101.7 ± 0.7 | 2, 2 | 4.0 |" in document
    assert "| n-grams | 10 | – | – | 4.0 | 9.0 | – | – |" in document
    assert "| a | 0.300 | 0.0% | 0.300 | 0.0% |" in document
    assert found["ngrams"]["10"] == {"kneser_ney": {"val_ppl": 5.0 * 10**-0.1, "test_ppl": 9.0}}
    assert not any("ngrams" in each for each in found["cells"])
    assert "costs \\$5" in document
    assert "Made by commit abc." in document
    assert "tokens^" not in sweep_table.sweep_document(results([10, 50]))


def test_what_runs_are_measured_by_has_a_table_with_dashes_where_a_baseline_has_none():
    summary = {"probe": {"horizon": 6, "recall": []}, "test": {"repeated_ppl": None, "ppl": 9.0}}
    assert sweep_table.measured(summary) == {"horizon": 6}
    cells = [
        cell("contexts", 10, seed, 100, measured={"horizon": seed, "repeated_ppl": 40.0})
        for seed in (1, 2, 6)
    ]
    cells.append(cell("none", 10, 1, 110, measured={"repeated_ppl": 50.0}))
    document = sweep_table.sweep_document(sweep_table.summarize({}, cells))
    assert "| Variant | Samples | Memory span | Pairs again |" in document
    assert "| contexts | 10 | 3 | 40.0 |" in document
    assert "| none | 10 | – | 50.0 |" in document


def test_the_figure_has_a_line_a_variant_and_their_exponents():
    figure = sweep_figure(results([10, 50, 200]))
    validation, test = figure.axes
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Validation", "Test"]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["a: tokens^-0.30", "costs $5: tokens^-0.30", "n-grams: tokens^-0.10"]
    (line,) = [each for each in validation.get_lines() if each.get_label() == words[0]]
    assert line.get_xdata().tolist() == [10_000, 50_000, 200_000]
    (counted,) = [each for each in test.get_lines() if each.get_label() == words[2]]
    assert counted.get_ydata().tolist() == [9, 9, 9]
    for ax in figure.axes:
        assert ax.get_xlabel()
        assert ax.get_ylabel()


def test_a_first_variant_without_a_test_hides_no_other():
    without = cell("a", 10, 1, 100, ngrams={"kneser_ney": {"val_ppl": 4.0}})
    del without["test_ppl"]
    figure = sweep_figure(sweep_table.summarize({}, [without, cell("b", 10, 1, 110)]))
    assert len(figure.axes) == 2


def test_one_sample_count_is_drawn_as_a_row_a_variant():
    figure = sweep_figure(results([10]))
    for ax in figure.axes:
        assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "costs $5"]
        assert "perplexity" in ax.get_xlabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["n-grams"]


def test_memory_is_drawn_against_perplexity_where_it_was_measured():
    cells = [
        cell(name, 10, seed, ppl + seed, measured={"horizon": back, "mean_recall": back / 50})
        for name, ppl, back in (("short", 100, 7), ("long", 120, 30))
        for seed in (1, 2)
    ]
    cells.append(cell("none", 10, 1, 110, measured={"repeated_ppl": 50.0}))
    figure = memory_figure(sweep_table.summarize({}, cells))
    for ax, scale in zip(figure.axes, (1, 50), strict=True):
        points = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
        assert points["short"] == [[7 / scale, 101.5]]
        assert points["long"] == [[30 / scale, 121.5]]
        assert ax.get_xlabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["short", "long"]
