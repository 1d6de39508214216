"""Tables and figures of sweeps whose results are made up."""

import io
import warnings

import numpy as np
import pytest
from drawn import legend
from sample_runs import runs

from ctxkv_lib.files import read_json
from ctxkv_lib.research.sweep_file import read_sweep, write_sweep
from ctxkv_lib.research.sweep_table import NGRAMS, results_of, summarize, sweep_document
from ctxkv_lib.views.power_laws import power_law, power_laws
from ctxkv_lib.views.study import STYLES, memory_figure, sweep_figure


def entry(variant, samples, seed, ppl, **more):
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
        "ngrams": {"kneser_ney": {"val_ppl": 5.0 * samples**-0.1, "test_ppl": 8.0 + seed}},
        "git_commit": "abc",
        **more,
    }


def results(counts):
    entries = [
        entry(name, n, seed, (100 + place) * n**-0.3 * (1 + seed / 100))
        for n in counts
        for place, name in enumerate(("a", "costs $5"))
        for seed in (1, 2)
    ]
    variants = {name: {"recipe": "exact", "settings": {}} for name in ("a", "costs $5")}
    return summarize(variants, entries)


def test_every_n_gram_baseline_has_a_line_style_of_its_own():
    assert len({*map(str, STYLES.values())}) == len(NGRAMS)


def test_a_power_law_is_said_of_three_sizes_and_more_and_has_its_exponent():
    points = [(tokens, 900 * tokens**-0.25) for tokens in (10, 50, 200)]
    law = power_law(points)
    assert (law["exponent"], law["factor"]) == (pytest.approx(0.25), pytest.approx(900))
    assert law["error"] == pytest.approx(0, abs=1e-9)
    assert power_law(points[:2] * 3) is None
    bent = power_law([*points, (200, 900 * 200**-0.25 * 1.21)])  # geometric mean 10% above
    x, y = np.log([10, 50, 200, 200]), np.log(900) - 0.25 * np.log([10, 50, 200, 200])
    y[-1] += np.log(1.21)
    assert bent["exponent"] == pytest.approx(-np.cov(x, y)[0, 1] / np.var(x, ddof=1))
    means = 900 * np.array([10, 50, 200]) ** -0.25 * [1, 1, 1.1]
    off = means / (bent["factor"] * np.array([10, 50, 200]) ** -bent["exponent"]) - 1
    assert bent["error"] == pytest.approx(-off.min())


def test_rows_have_mean_spread_and_n_grams_beside():
    found = results([10, 50, 200])
    document = sweep_document(found)
    assert "---: |\n| a | 10 | 2 | 10 | 50.9 ± 0.4 | 101.7 ± 0.7 | 2, 2 | 4.0 |" in document
    assert "| n-grams | 10 | – | – | 4.0 | 9.0 | – | – |" in document
    assert "| a | 0.300 | 0.0% | 0.300 | 0.0% |" in document
    assert found["ngrams"]["10"] == {"kneser_ney": {"val_ppl": 5.0 * 10**-0.1, "test_ppl": 9.0}}
    assert not any("ngrams" in each for each in found["cells"])
    assert "costs \\$5" in document
    assert "Made by commit abc." in document
    assert "tokens^" not in sweep_document(results([10, 50]))


def test_an_entry_has_the_time_of_both_phases_and_whether_the_code_was_changed(tmp_path):
    (run,) = runs(tmp_path, 500)
    run.summary["provenance"]["git_commit"] = "0123456789" * 4 + "-dirty"
    found, epochs = results_of(run.summary), run.summary["phase2"]["epochs"]
    assert (found["git_commit"], "test_ppl" in found) == ("01234567-dirty", False)
    assert found["seconds"] == pytest.approx(6.4 + sum(epoch["seconds"] for epoch in epochs), rel=1e-3)
    run.summary["test"] = {"ppl": 9.0, "acc": 0.5, "conversations": [[10, 2.5]]}
    assert results_of(run.summary)["test_conversations"] == [2.5]


def test_what_all_seeds_of_a_row_share_is_written_once_and_read_again(tmp_path):
    made = [
        entry("same", 10, 1, 5.0, threads=1),
        entry("same", 10, 2, 6.0, threads=1),
        entry("other commit", 10, 1, 7.0, threads=1),
        entry("other commit", 10, 2, 8.0, threads=1, git_commit=None),
        entry("one failed", 10, 1, 7.0),
        {"variant": "one failed", "samples": 10, "seed": 2, "state": "diverged", "error": "why"},
    ]
    found, file = summarize({}, made), tmp_path / "sweep.json"
    write_sweep(file, found)
    stored = read_json(file)
    often = {"threads", "git_commit"}
    assert [[often & {*row}, *(often & {*cell} for cell in row["cells"])] for row in stored["rows"]] == [
        [often, set(), set()],
        [{"threads"}, {"git_commit"}, {"git_commit"}],
        [set(), {"git_commit"}, set()],
    ]
    assert read_sweep(file) == found


def test_settings_that_all_variants_have_are_said_once():
    settings = {"a": {"data.samples": 3, "x.y": 1}, "b": {"data.samples": 3, "x.y": 2}}
    variants = {name: {"recipe": "exact", "settings": own} for name, own in settings.items()}
    document = sweep_document(summarize(variants, [entry(name, 3, 1, 2.0) for name in variants]))
    assert "\nAll have data.samples=3.\n\n- a: recipe exact, x.y=1\n- b: recipe exact, x.y=2\n" in document
    alone = sweep_document(summarize({"a": variants["a"]}, [entry("a", 3, 1, 2.0)]))
    assert "\n1 grid point: 1 finished.\n" in alone
    assert "\n## Variants\n\n- a: recipe exact, data.samples=3, x.y=1\n" in alone


def test_measurements_have_a_table_and_a_figure_with_gaps_where_a_baseline_has_none():
    entries = [
        entry(name, 10, seed, ppl + seed, measured={"horizon": back, "mean_recall": back / 50, "zero": back})
        for name, ppl, back in (("short", 100, 7), ("long", 120, 1000))
        for seed in (1, 2)
    ]
    entries.append(entry("none", 10, 1, 110, measured={"repeated_ppl": 50.0, "elsewhere": -0.03}))
    found = summarize({}, entries)
    document = sweep_document(found)
    assert "| Variant | Samples | Memory span | Mean | Zero | Others' | Pairs again |" in document
    assert "| short | 10 | 7 | 0.14 | +7.0% | – | – |" in document
    assert "| long | 10 | 1,000 | 20.00 | over 1,000% | – | – |" in document
    assert "| none | 10 | – | – | – | +0.0% | 50.0 |" in document
    figure = memory_figure(found)
    for ax, scale in zip(figure.axes, (1, 50), strict=True):
        points = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
        assert points["short"] == [[7 / scale, 101.5]]
        assert points["long"] == [[1000 / scale, 121.5]]
        assert ax.get_xlabel()
    assert legend(figure) == ["short", "long"]


def test_the_figure_has_a_line_a_variant_and_their_exponents_of_the_split_that_is_drawn():
    found = results([10, 50, 200])
    figure = sweep_figure(found)
    validation, test = figure.axes
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Validation", "Test"]
    words = legend(figure)
    fitted = [f"{name}: validation ~ tokens^-{by}" for name, by in (("a", "0.30"), ("costs $5", "0.30"))]
    assert words == [*fitted, "n-grams: validation ~ tokens^-0.10"]
    (line,) = [each for each in validation.get_lines() if each.get_label() == words[0]]
    assert line.get_xdata().tolist() == [10_000, 50_000, 200_000]
    (counted,) = [each for each in test.get_lines() if each.get_label() == words[2]]
    assert (counted.get_linestyle(), counted.get_ydata().tolist()) == (STYLES["n-grams"], [9, 9, 9])
    assert [len(each.get_xdata()) for each in validation.get_lines()] == [3, 6, 3, 6, 3]  # and each seed
    assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_yscale() == "log" for ax in figure.axes)
    assert [tick.get_text() for tick in test.get_xticklabels()] == ["10,000", "50,000", "200,000"]
    alone = sweep_figure({**found, "rows": [{**row, "val_ppl": []} for row in found["rows"]]})
    assert [ax.get_title(loc="left") for ax in alone.axes] == ["Test"]
    (law,) = [law["test_ppl"] for law in power_laws(found["rows"]) if law["variant"] == "n-grams"]
    assert f"n-grams: test ~ tokens^{-law['exponent']:.2f}" in legend(alone)
    for row in found["rows"]:
        row["test_ppl"] = [] if row["variant"] == "costs $5" or row["samples"] == 10 else row["test_ppl"]
    _, test = sweep_figure(found).axes
    assert [len(each.get_xdata()) for each in test.get_lines()] == [2, 4, 2]


def test_more_variants_than_styles_are_drawn():
    names = [str(number) for number in range(50)]
    entries = [entry(name, n, 1, 100.0) for name in names for n in (10, 50)]
    figure = sweep_figure(summarize({name: {} for name in names}, entries))
    assert set(names) <= {line.get_label() for line in figure.axes[0].get_lines()}


def test_one_sample_count_is_drawn_as_a_row_a_variant():
    figure = sweep_figure(results([10]))
    for ax in figure.axes:
        assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "costs $5"]
        assert "perplexity" in ax.get_xlabel()
        assert "n-grams: " in ax.get_xlabel()  # far beyond the rows
    assert legend(figure) == ["first row"]
    near = {"kneser_ney": {"val_ppl": 105.0, "test_ppl": 9.0}, "kneser_ney_cache": {"val_ppl": 900.0}}
    rows = [entry(name, 10, 1, ppl, ngrams=near) for name, ppl in (("a", 100.0), ("b", 110.0))]
    validation, test = (figure := sweep_figure(summarize({}, rows))).axes
    assert ["n-grams: " in ax.get_xlabel() for ax in (validation, test)] == [False, True]
    assert "n-grams and cache: 900.0" in validation.get_xlabel()
    assert legend(figure) == ["first row", "n-grams"]
    far = {kind: {"val_ppl": 5.0, "test_ppl": 9.0} for kind in NGRAMS}
    with warnings.catch_warnings(action="error"):  # as of an axis without room
        sweep_figure(summarize({}, [entry("alone", 10, 1, 100, ngrams=far)])).savefig(io.BytesIO())
    without = entry("a", 10, 1, 100, ngrams={"kneser_ney": {"val_ppl": 4.0}})
    del without["test_ppl"]  # hides no other's
    assert len(sweep_figure(summarize({}, [without, entry("b", 10, 1, 110)])).axes) == 2
