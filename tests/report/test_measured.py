"""Test split and yardsticks in report, table and figure: shown where they were measured, absent where not."""

import pytest
from sample_runs import sample_run
from test_report import numbers, row

from ctxkv_lib.files import read_json, write_json
from ctxkv_lib.report import comparison_table, write_report
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
MEASURED = {"test": {"ppl": 163.7, "acc": 0.213, "tokens": 21_000}, "yardsticks": COUNTED}


def measured_run(folder, samples=500, **measured):
    path = sample_run(folder, samples)
    summary = read_json(path / "summary.json")
    write_json(path / "summary.json", {**summary, **measured})
    return load_run(path)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_report_holds_what_was_measured(tmp_path, language):
    report = write_report([measured_run(tmp_path / "run", **MEASURED)], language)
    shown = "150.2 131.3 163.7 21.3% 141.9 120.8 +19.3% +36.5% +15.4% +35.5%"
    assert all(value in report for value in shown.split())


def test_both_languages_hold_the_same_numbers(tmp_path):
    runs = [measured_run(tmp_path / "run", **MEASURED)]
    assert numbers(write_report(runs, "en")) == numbers(write_report(runs, "ja"))


def test_an_older_run_has_no_section_or_dashes(tmp_path):
    older, newer = measured_run(tmp_path / "a", 100), measured_run(tmp_path / "b", **MEASURED)
    assert "yardsticks" not in write_report([older])
    report = write_report([older, newer])
    assert row(report, "Val PPL of n-grams")[1:] == ["–", "150.2"]
    assert "500 samples: val PPL is +19.3% against n-grams of order 4 (uniform floor)" in report
    assert "100 samples: val PPL is" not in report


def test_a_run_without_a_test_split_has_no_rows_of_it(tmp_path):
    counted = {kind: {k: v for k, v in row.items() if k != "test_ppl"} for kind, row in COUNTED.items()}
    report = write_report([measured_run(tmp_path / "run", yardsticks=counted)])
    assert "Val PPL of n-grams" in report
    assert "Test" not in report.partition("weight are chosen on validation.")[2].partition("\n## ")[0]


def test_the_terminal_table_has_a_row_for_each_measure(tmp_path):
    older, newer = measured_run(tmp_path / "a", 100), measured_run(tmp_path / "b", **MEASURED)
    table = comparison_table([older.summary, newer.summary])
    shown = [line.split()[-2:] for line in table.splitlines() if line.startswith("Val PPL of n-grams")]
    assert shown == [["–", "150.2"], ["–", "131.3"]]
    assert "n-grams" not in comparison_table([older.summary])


def test_the_curves_have_a_line_for_the_yardstick(tmp_path):
    def dotted(figure):
        return [line.get_ydata()[0] for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]

    summaries = [measured_run(tmp_path / "a", 100).summary, measured_run(tmp_path / "b", **MEASURED).summary]
    assert dotted(ppl_curves(summaries)) == [150.2]
    assert dotted(ppl_curves(summaries[:1])) == []
