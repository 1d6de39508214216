"""The report and the tables show the numbers of the runs, in both languages."""

import re
from dataclasses import replace

import pytest
from conftest import PreviousToken
from sample_runs import EPOCHS, sample_run

from ctxkv_lib.errors import UserError
from ctxkv_lib.report.difference import standard_error
from ctxkv_lib.report.document import write_report
from ctxkv_lib.report.model_card import model_card
from ctxkv_lib.report.tables import comparison_table, epochs_table
from ctxkv_lib.runs.published import PUBLISHED

NUMBER = re.compile(r"(?<![Ff]p)\d+(?:,\d{3})*(?:\.\d+)?")
UNTRANSLATED = {"Train PPL", "Val PPL", "Val Acc", "Val/Train Ratio", "torch", "train_ctx", "train_emb"}
UNTRANSLATED |= {"val_ctx", "val_emb", "## Phase 2: 100 samples", "## Phase 2: 500 samples"}
EVERY_KIND = [
    {},
    {"preset": "offline", "gpu": False},
    {"recipe": "exact"},
    {"recipe": "tuned"},
    {"settings": {"model.kv_method": "variable"}},
    {"settings": {"phase2.max_epochs": 3}, "epochs": EPOCHS[500][:3]},
    {"epochs": [(100 + n, 200 + n, 0.1) for n in range(4)]},
]


def row(report, name):
    """Return the cells after the name in the first table row that starts with `name`."""
    (line, *_) = [line for line in report.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def labels(report):
    """Return the lines of text and the first cells of table rows."""
    cells = (line.strip("| ").partition(" |")[0] for line in report.splitlines())
    return {cell for cell in cells if re.search("[a-z]", cell)}


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_both_languages_say_the_same_about_every_kind_of_run(options):
    both = {f"{count} samples": sample_run(count, **options) for count in (100, 500)}
    for runs in (both, {"500 samples": both["500 samples"]}):
        english, japanese = write_report(runs), write_report(runs, "ja")
        for line, translated in zip(english.splitlines(), japanese.splitlines(), strict=True):
            in_order = sorted if line.startswith("The original is") else list  # the order differs in Japanese
            assert in_order(NUMBER.findall(line)) == in_order(NUMBER.findall(translated))
            assert line.startswith("#") == translated.startswith("#")
        assert not re.search(r"[ぁ-ん一-龥]", english)
        assert labels(english) & labels(japanese) <= UNTRANSLATED
        assert not re.search(r"(?m)^(?!.*--set).*[a-z]+ [a-z]+ [a-z]+", japanese)  # no English sentence
        for report in (english, japanese):
            assert not re.search(r"[{}]|\bNone\b|\bnan\b|\n\n\n", report)


def test_numbers_follow_the_summary():
    run = sample_run(500)
    run.summary["phase2"] |= {"val_ppl": 1234.56, "seconds_per_epoch": 77.0}
    run.summary["phase1"] |= {"effective_rank": 0.456, "iterations": 29, "stop_reason": "max_iterations"}
    run.summary["test"] = {"ppl": 201.5, "acc": 0.123, "conversations": [[10, 5.0], [30, 5.4], [20, 5.2]]}
    run.summary["ngrams"] = {
        "kneser_ney": {"val_ppl": 300.1, "test_ppl": 301.2},
        "kneser_ney_cache": {"val_ppl": 290.1, "test_ppl": 291.2},
    }
    run.summary["memory"][-1] |= {"cpu_gib": 3.4, "cpu_peak_gib": 3.6}
    report = write_report([run])
    for name, shown in {
        "Val PPL": "1,234.6",
        "Time per epoch (s)": "77.0",
        "Effective rank": "45.6%",
        "Iterations": "29",
        "Stopped": "max_iterations",
        "Test PPL": "201.5",
        "Val PPL of n-grams": "300.1",
        "Val PPL of n-grams and cache": "290.1",
        "Test PPL of n-grams": "301.2",
        "Test PPL of n-grams and cache": "291.2",
        "phase 2 prepared": "2.8 (3.1)",  # GiB at the stage's end, and its peak
        "last epoch": "3.4 (3.6)",
    }.items():
        assert row(report, name)[0] == shown
    error = standard_error(run.summary["test"]["conversations"])
    assert f"standard error of ±{error:.1%} over 3 test conversations" in report
    assert "Test PPL" not in write_report([sample_run()])


def test_the_original_is_shown_beside_runs_that_repeat_it_and_no_others():
    repeated, other = write_report([sample_run(500)]), write_report([sample_run(500, recipe="exact")])
    in_bf16 = write_report([sample_run(500, settings={"runtime.precision": "bf16"})])
    assert row(repeated, "Val PPL") == ["179.2", "175.7"]
    assert row(repeated, "Time (s)") == ["6.4", "30.0"]
    assert row(repeated, "train_ctx") == ["575.0", "574.0"]
    assert row(repeated, "train_ctx in the original's layout (MiB)") == ["574.2", "574.0"]
    assert "the original, 500 samples" not in other + in_bf16
    assert "cannot be compared with the original" in other


def test_the_last_run_is_compared_with_the_first_and_only_on_one_text():
    runs = {f"{count} samples": sample_run(count) for count in (100, 500)}
    table = comparison_table(runs)
    shown = ["100 samples", "the original, 100 samples", "500 samples", "the original, 500 samples"]
    assert [*table.columns] == [*shown, "change"]
    assert [*table["change"]] == ["-51.1%", "+4.5 points", "", "-9.6%", "", ""]
    assert "factor of 4.8, val PPL changed by -51.1%, and val acc changed by +4.5 p" in write_report(runs)
    runs["500 samples"].summary["provenance"]["data"]["validation_fingerprint"] = "another"
    assert "change" not in comparison_table(runs)
    assert "validated on different texts" in write_report(runs)
    assert "検証に使ったテキストが実験によって異なる" in write_report(runs, "ja")
    original = comparison_table({"100": PUBLISHED[100], "500": PUBLISHED[500]})
    assert list(original.loc["Val PPL"]) == ["361.0", "175.7", "-51.3%"]


def many_runs():
    """Return runs that differ in four settings; the first repeats the original, and run 2 is the best."""
    runs = {"first": sample_run(500)}
    for number in (1, 2, 3):
        settings = {
            "model.attention_dropout": 0.2,
            "phase2.weight_decay": number / 10,
            "runtime.seed": number,
        }
        epochs = [(100 + abs(number - 2), 200 + abs(number - 2), 0.1), (99.0, 300.0, 0.1)]
        settings |= {"phase2.patience": 3 + number}
        runs[f"run {number}"] = sample_run(500, settings=settings, epochs=epochs)
    runs["run 2"].summary["phase2"]["val_ppl"] = 150.0
    return runs


def test_a_report_of_many_runs_has_a_row_per_run_and_the_epochs_of_the_best():
    english, japanese = write_report(many_runs()), write_report(many_runs(), "ja")
    name = "run 2"
    for report, original, heading in (
        (english, "the original, 500 samples", "Phase 2"),
        (japanese, "元の実験、500サンプル", "Phase 2"),
    ):
        results = report.partition("| Val PPL |")[2]
        assert row(results, name)[0] == "150.0"
        assert row(results, original)[0] == "175.7"
        assert re.findall(rf"(?m)^## {heading}: (.*)$", report) == [name]
        assert len(re.findall(r"(?m)^- ", report)) == 2  # how the best run was trained
    assert row(english, "Train tokens") == ["587,970"]  # the same for all runs
    assert "| Run | Random seed |" in english
    assert "| change |" not in english
    assert "times the training tokens" not in english
    assert not re.search(r"(?m)^(?!.*--set).*[a-z]+ [a-z]+ [a-z]+", japanese)
    for line, translated in zip(english.splitlines(), japanese.splitlines(), strict=True):
        assert sorted(NUMBER.findall(line)) == sorted(NUMBER.findall(translated))
    assert "Settings that differ" not in write_report(dict.fromkeys("abcd", sample_run(500)))


def test_many_runs_that_differ_only_in_samples_show_the_change():
    runs = {str(count): sample_run(count) for count in (100, 200, 300, 500)}
    assert row(write_report(runs).partition("| Val PPL |")[2], "change")[0] == "-51.1%"


def test_overfitting_and_the_end_of_training_are_derived_from_the_epochs():
    assert "179.2 → 211.3, which shows overfitting" in write_report([sample_run()])
    flat = [(100.0, 200.0, 0.1), (100.0, 201.0, 0.1)]
    assert "200.0 → 201.0, which shows no clear overf" in write_report([sample_run(epochs=flat)])
    report = write_report([sample_run(epochs=EPOCHS[500][:3], settings={"phase2.max_epochs": 3})])
    assert "training ended at epoch 3 (max_epochs)" in report
    assert "overfitting" not in report  # it is too early to say
    epochs = epochs_table(sample_run().summary)
    assert [*epochs["Note"]] == ["improved", "improved", "best", "worse", "worse", "worse"]
    assert [*epochs["Val/Train Ratio"]] == ["0.52", "1.00", "1.67", "3.06", "4.02", "6.27"]


def test_a_run_without_phase_1_shows_no_figure_of_phase_1():
    run = sample_run()
    assert "figures/phase1.png" in write_report([run])
    report = write_report([replace(run, metrics=run.metrics[-6:])])  # only the epochs
    assert re.findall(r"figures/\w+", report) == ["figures/ppl_curves", "figures/memory"]


def test_a_vertical_bar_in_a_value_does_not_split_its_table_cell():
    run = sample_run()
    run.summary["provenance"]["device"] = "a | card {z}"
    assert "| Device | a \\| card {z} | – |" in write_report([run])


def test_no_runs_or_an_unknown_language_are_refused():
    with pytest.raises(UserError, match="needs at least one run"):
        write_report([])
    with pytest.raises(UserError, match="that is en or ja; language is 'de'"):
        write_report([sample_run()], "de")


def test_the_model_card_has_settings_results_and_the_license_of_the_data(tiny_settings):
    assert row(model_card(sample_run(recipe="tuned")), "Recipe") == ["tuned"]
    card = model_card(sample_run(500))
    assert card.startswith("---\nlicense: mit\n")
    assert row(card, "Train tokens") == ["587,970"]
    assert row(card, "Val PPL") == ["179.2"]
    assert "license: unknown" in model_card(sample_run(8, settings=tiny_settings))


def test_a_run_that_is_worse_than_guessing_says_so_and_is_not_called_overfitting():
    run = sample_run(epochs=[(60_000.0, 70_000.0, 0.0), (50_000.0, 80_000.0, 0.0)])
    english, japanese = write_report([run]), write_report([run], "ja")
    assert "val PPL 70,000.0 is worse than guessing uniformly" in english
    assert "検証PPLは70,000.0で、全トークンを等確率で予測した場合のPPL（語彙数の50,257）より悪い" in japanese
    assert "overfitting" not in english
    assert "過学習" not in japanese


def test_the_report_of_own_parts_has_nothing_that_the_original_stored_or_proposed():
    own, published = sample_run(plugins={"layer": PreviousToken}), sample_run()
    for language in ("en", "ja"):
        report = write_report([own], language)
        for text in ("--samples 1000", "in the original's layout", "the original's layout", "元の実装の形式"):
            assert text not in report
        assert "--samples 1000" in write_report([published], language)
        assert row(report, "train_ctx") == ["575.0"]
