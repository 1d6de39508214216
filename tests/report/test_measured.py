"""Measurements in report, table and figure: shown where there are any, absent where not."""

import numpy as np
import pytest
from drawn import line as drawn
from sample_runs import sample_run
from test_report import numbers, row

from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.report.document import comparison_table, format_ablations, probe_table, write_report
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views.figures import ppl_curves
from ctxkv_lib.views.study import recall_accuracy, use_of_contexts

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
ROW = {"tokens": 52, "ppl": 91.2, "accuracy": 0.31, "other_ppl": 118.4}
ABLATIONS = {
    "positions": 1024,
    "changed": {
        name: {"ppl": 179.2 + extra, "percent": extra, "error": 0.6}
        for name, extra in {
            "intact": 0,
            "slot_0": 3.4,
            "shuffled": 4.1,
            "elsewhere": 5.7,
            "zero": 61.3,
        }.items()
    },
    "slots": [
        {"slot": k, "back": 20.0 * k, "ppl": 182.0 - k, "percent_vs_elsewhere": -k, "error": 0.2}
        for k in range(3)
    ],
    "by_history": [{"from": 0, "to": 63, **ROW}, {"from": 640, "to": None, **ROW}],
    "by_frequency": [{"from": 0, "to": 0, **ROW}],
    "by_repetition": [{"from": 0, "to": 0, **ROW}, {"from": 1, "to": 1, **ROW, "ppl": 23.9}],
}
TASK = {
    "answers": 1500,
    "accuracy": 0.647,
    "ppl": 4.8,
    "values": 25,
    "by_distance": [{"from": 1, "to": 19, "tokens": 180, "ppl": 3.3, "accuracy": 0.71}],
    "by_place": [
        {"from": 0, "to": 0, "tokens": 75, "ppl": 2.2, "accuracy": 0.93},
        {"from": 1, "to": 1, "tokens": 71, "ppl": 7.7, "accuracy": 0.456},
    ],
}
GENERATION = {
    "samples": 20,
    "longest_run": 17,
    "repeated": 0.834,
    "text": {"longest_run": 2, "repeated": 0.213},
    "sample": {"prompt": "Is it *so*", "generated": " or | not"},
}
USED = {"ablations": ABLATIONS, "recall_task": TASK, "generation": GENERATION}
MEASURED = {"test": {"ppl": 163.7, "acc": 0.213, "tokens": 21_000}, "ngrams": COUNTED}


def measured_run(folder, samples=500, **measured):
    run = load_run(sample_run(folder, samples))
    run.summary.update(measured)
    return run


def test_a_probe_calls_no_run_trained_which_may_be_without_phase_1():
    block = dict.fromkeys(("mean_recall", "horizon", "coverage", "centroid", "effective_rank"), 0.25)
    block |= {"recall": [], "horizon": 1}
    for language, name in {"en": "this run", "ja": "この実験"}.items():
        header, *_ = probe_table({**block, "fresh": {"0.1": block}}, ModelConfig(), language)
        assert header[1] == name


def test_several_runs_have_figures_in_the_folder_of_their_comparison_alone(tmp_path):
    runs = [measured_run(tmp_path / str(samples), samples) for samples in (100, 500)]
    assert "figures/" not in write_report(runs)
    assert "(figures/ppl_curves.png)" in write_report(runs, has_figures=True)
    assert "(figures/ppl_curves.png)" in write_report(runs[:1])


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_report_holds_what_was_measured(tmp_path, language):
    runs = [measured_run(tmp_path / "run", **MEASURED, **USED)]
    report = write_report(runs, language)
    assert numbers(report) == numbers(write_report(runs))
    shown = "150.2 131.3 163.7 21.3% 141.9 120.8 19.3% 36.5% 15.4% 35.5% 1,024 61.3% 240.5 118.4 23.9 "
    shown += "1,500 64.7% 4.0% 45.6% 83.4% 21.3% 640+ ablations.png recall_task.png"
    assert all(value in report for value in shown.split())
    assert "+5.7% ± 0.6" in report
    assert "Is it \\*so\\*" in report
    assert "or \\| not" in report
    zeros = {"ppl": 5e5, "percent": 278_917.9, "error": 1234.5}
    terminal = format_ablations({**ABLATIONS, "changed": {**ABLATIONS["changed"], "zero": zeros}}, language)
    assert "+278,917.9% ± 1,234.5" in terminal
    assert "+5.7% ± 0.6" in terminal
    assert "23.9" in terminal


def test_a_comparison_shows_what_other_contexts_cost_by_run(tmp_path):
    older = measured_run(tmp_path / "a", 100)
    newer = measured_run(tmp_path / "b", **USED)
    report = write_report([older, newer])
    assert row(report, "zeros")[1:] == ["+61.3% ± 0.6"]
    assert row(report, "Positions measured")[1:] == ["1,024"]
    assert row(report, "Val PPL of a token in a pair already seen in the window (positions)")[1:] == [
        "23.9 (52)"
    ]
    assert row(report, "Repeated tokens")[1:] == ["83.4%"]
    assert "ablations.png" not in report
    assert "Is it" not in report
    assert "used for" not in write_report([older])


def test_the_figures_draw_every_ablation_and_every_slot():
    changed, slots, pairs = use_of_contexts(ABLATIONS).axes
    assert changed.get_yticklabels()[0].get_text() == "its own"
    assert changed.texts[1].get_text() == "182.6\n(+3.4% ± 0.6)"
    same = {**ABLATIONS["changed"]["slot_0"], "percent": -0.03}
    changed_little = {**ABLATIONS, "changed": {**ABLATIONS["changed"], "slot_0": same}}
    assert use_of_contexts(changed_little).axes[0].texts[1].get_text() == "182.6\n(+0.0% ± 0.6)"
    assert len(changed.containers) == len(ABLATIONS["changed"])
    _, _, (spread,) = changed.containers[0]
    assert np.ptp(spread.get_segments()[0], axis=0).tolist() == pytest.approx([2 * 0.006 * 179.2, 0])
    assert drawn(slots, "all slots").get_ydata()[0] == pytest.approx(100 * (179.2 / 184.9 - 1))
    line, *_ = slots.containers[0]
    assert line.get_xdata().tolist() == [0, 20, 40]
    assert line.get_ydata().tolist() == [0, -1, -2]
    assert [bar.get_height() for bar in pairs.patches] == [91.2, 23.9, 118.4, 118.4]
    assert [label.get_text()[:5] for label in pairs.get_xticklabels()] == ["a new", "a rep"]
    distances, places = recall_accuracy(TASK).axes
    assert [[bar.get_height() for bar in ax.patches] for ax in (distances, places)] == [[71], [93, 45.6]]
    assert drawn(places, "guessing a value").get_ydata()[0] == 4
    (_, _, (spread,)), _ = places.containers
    assert np.ptp(spread.get_segments()[1][:, 1]) == pytest.approx(2 * 100 * (0.456 * 0.544 / 71) ** 0.5)


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
