"""Measurements in report, table and figure: shown where there are any, absent where not."""

import pytest
from sample_runs import sample_run
from test_report import numbers, row

from ctxkv_lib.report.document import comparison_table, probe_table, write_report
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views.figures import ppl_curves

COUNTED = {
    "kneser_ney": {"order": 4, "floor": "uniform", "cache_weight": 0.0, "val_ppl": 150.2, "test_ppl": 141.9},
    "kneser_ney_cache": {
        "order": 5,
        "floor": "table text",
        "cache_weight": 0.1,
        "val_ppl": 131.3,
        "test_ppl": 120.8,
    },
}
BLOCK = {
    "decodability": [{"distance": n, "r2": 0.5 / (n + 1), "top1": 0.25} for n in range(4)],
    "memory_span": 3,
    "coverage": 0.25,
}
PROBE = {
    **BLOCK,
    "untrained": {"0.1": BLOCK},
    "offsets": [20 * slot for slot in range(32)],
    "positions": 1024,
    "changed": {
        "zero": {"ppl": 240.5, "percent": 61.3, "error": 0.6},
        "elsewhere": {"ppl": 184.9, "percent": 5.7, "error": 0.6},
    },
}
MEASURED = {"test": {"ppl": 163.7, "acc": 0.213, "tokens": 21_000}, "ngrams": COUNTED}


def measured_run(folder, samples=500, **measured):
    run = load_run(sample_run(folder, samples))
    run.summary.update(measured)
    return run


def test_a_probe_calls_no_run_trained_which_may_be_without_phase_1():
    for language, name in {"en": "this run", "ja": "この実験"}.items():
        header, *_ = probe_table(PROBE, language)
        assert header[1] == name


def test_several_runs_have_figures_in_the_folder_of_their_comparison_alone(tmp_path):
    runs = [measured_run(tmp_path / str(samples), samples) for samples in (100, 500)]
    assert "figures/" not in write_report(runs)
    assert "(figures/ppl_curves.png)" in write_report(runs, has_figures=True)
    assert "(figures/ppl_curves.png)" in write_report(runs[:1])


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_report_holds_what_was_measured(tmp_path, language):
    runs = [measured_run(tmp_path / "run", **MEASURED, probe=PROBE)]
    report = write_report(runs, language)
    assert numbers(report) == numbers(write_report(runs))
    shown = "150.2 131.3 163.7 21.3% 141.9 120.8 19.3% 36.5% 15.4% 35.5% 1,024 25.0% probe.png"
    assert all(value in report for value in shown.split())
    assert "+5.7% ± 0.6" in report
    assert "+61.3% ± 0.6" in report


def test_a_comparison_shows_what_other_contexts_cost_by_run(tmp_path):
    older = measured_run(tmp_path / "a", 100)
    newer = measured_run(tmp_path / "b", probe=PROBE)
    report = write_report([older, newer])
    assert row(report, "zeros")[1:] == ["+61.3% ± 0.6"]
    assert row(report, "Positions measured")[1:] == ["1,024"]
    assert "probe.png" not in report
    assert "used for" not in write_report([older])


def test_n_grams_that_count_the_text_of_a_table_have_a_row(tmp_path):
    counted = {**COUNTED, "kneser_ney_table_cache": {**COUNTED["kneser_ney"], "val_ppl": 99.7}}
    runs = [measured_run(tmp_path / "a", **MEASURED), measured_run(tmp_path / "b", ngrams=counted)]
    assert row(write_report(runs), "Val PPL of n-grams (table’s text too) and cache")[1:] == ["–", "99.7"]
    assert "(table’s text too)" not in write_report(runs[:1])


def test_a_difference_is_taken_conversation_by_conversation(tmp_path):
    """Losses lie 0.75 and 0.25 from their mean over tokens, the models' differences 0.15 and 0.05."""

    def of(*losses):
        tested = [*zip((10, 30, 20), losses, strict=False)]
        return MEASURED | {"test": {**MEASURED["test"], "conversations": tested}}

    first, better = (
        measured_run(tmp_path / "a", 100, **of(5, 6)),
        measured_run(tmp_path / "b", **of(4.9, 5.7)),
    )
    report = write_report([first, better])
    assert (
        "- 100 samples: the test PPL has a standard error of ±37.5% over the 2 conversations of the test."
        in report
    )
    line = "- 500 samples compared with 100 samples, conversation by conversation: test PPL -22.1%, ±5.8%."
    assert line in report
    assert "tested on different texts" not in report
    better.summary["test"]["fingerprint"] = "another"
    assert line in write_report([first, better])  # that of the first is not known
    first.summary["test"]["fingerprint"] = "one"
    report = write_report([first, better])
    assert "conversation by conversation" not in report
    assert "> The runs were tested on different texts: their test perplexities cannot be compared." in report
    del better.summary["test"]["fingerprint"]  # as of a run of before
    better.summary["test"]["tokens"] = 9
    assert "tested on different texts" in write_report([first, better])
    assert "standard error" not in write_report([measured_run(tmp_path / "d", **of(5))])
    other = measured_run(tmp_path / "c", **of(4.9, 5.9, 6))
    assert "conversation by conversation" not in write_report([first, other])
    assert "conversation by conversation" not in write_report([better])


def test_a_run_that_was_not_measured_has_no_section_row_or_line_and_dashes_beside_others(tmp_path):
    def dotted(figure):
        return [line.get_ydata()[0] for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]

    older, newer = measured_run(tmp_path / "a", 100), measured_run(tmp_path / "b", **MEASURED)
    assert "n-gram" not in write_report([older])
    tested = write_report([measured_run(tmp_path / "c", test=MEASURED["test"])])
    assert "### Test split\n" in tested
    assert "n-gram" not in tested
    report = write_report([older, newer])
    assert row(report, "Val PPL of n-grams")[1:] == ["–", "150.2"]
    assert "500 samples: val PPL, compared with n-grams of order 4 (base: uniform): 19.3% higher; " in report
    assert "100 samples: val PPL, compared" not in report
    summaries = [older.summary, newer.summary]
    table = comparison_table(summaries)
    shown = [line.split()[-2:] for line in table.splitlines() if line.startswith("Val PPL of n-grams")]
    assert shown == [["–", "150.2"], ["–", "131.3"]]
    assert "n-grams" not in comparison_table(summaries[:1])
    assert dotted(ppl_curves(summaries)) == [150.2]
    assert dotted(ppl_curves(summaries[:1])) == dotted(ppl_curves(summaries, curves=["accuracy"])) == []


def test_a_run_without_a_test_split_has_no_rows_of_it(tmp_path):
    counted = {kind: {k: v for k, v in row.items() if k != "test_ppl"} for kind, row in COUNTED.items()}
    report = write_report([measured_run(tmp_path / "run", ngrams=counted)])
    assert "Val PPL of n-grams" in report
    assert "Test" not in report.partition("weight are chosen on validation.")[2].partition("\n## ")[0]
