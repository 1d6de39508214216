"""The written report: every section, both languages, and numbers that follow the run."""

import re
from collections import Counter

import pytest
from drawn import HOSTILE
from sample_runs import EPOCHS, runs, sample_run

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.report.columns import example_positions
from ctxkv_lib.report.document import comparison_table, observations, write_report
from ctxkv_lib.report.info import describe
from ctxkv_lib.report.model_card import model_card
from ctxkv_lib.report.tables import literal
from ctxkv_lib.report.terminal import format_info, terminal_table
from ctxkv_lib.report.verdicts import epoch_note, overfitting
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.differences import run_folders
from ctxkv_lib.runs.models import shapes
from ctxkv_lib.runs.published import published_samples
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.runs.trained import load_trained

PHASE_NAME = re.compile(r"Phase [12]")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def numbers(report):
    return Counter(NUMBER.findall(PHASE_NAME.sub("", report)))


def row(report, name):
    """Cells of the first table row that starts with `name`."""
    (line, *_) = [line for line in report.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_an_attention_of_the_user_does_with_missing_slots_is_left_to_it(tmp_path, own_module):
    mine = own_module(
        "mine", "from ctxkv_lib.method.model import ContextKVAttention\nclass Mine(ContextKVAttention): 0"
    )
    (found,) = runs(tmp_path / "runs", 500, settings={"attention": f"{mine}:Mine"})
    assert "are zero vectors; what becomes of them is up to `mine:Mine`" in write_report([found])
    assert "（扱いは`mine:Mine`による）" in write_report([found], "ja")
    assert "copying" not in write_report([found])
    report = write_report([found, *runs(tmp_path / "plain", 500), *runs(tmp_path / "again", 500)])
    assert report.count("every position attends 32 slots") == 2  # with an attention of the user, and without
    assert "is up to `mine:Mine`; method 2" in report
    assert "is up to" not in write_report(runs(tmp_path / "others", 500, recipe="tuned"))


SECTIONS = (
    "Settings, Context window, Results, Phase 1, Phase 2, Final results, Early stopping, Comparison, "
    "Overfitting, Memory, Fixed-count KV, Next experiments, Conclusion"
)


def test_report_has_every_section_of_the_published_report(tmp_path):
    report = write_report(runs(tmp_path, 100, 500), has_figures=True)
    headings = re.findall(r"^##+ (.*)", report, re.MULTILINE)
    sections = SECTIONS.split(", ")
    found = [next((name for name in sections if heading.startswith(name)), None) for heading in headings]
    assert [name for name in found if name] == sections
    for figure in ("ppl_curves", "phase1", "memory"):
        assert f"](figures/{figure}.png)" in report


EVERY_KIND = [
    {},
    {"preset": "offline", "gpu": False},
    {"recipe": "exact"},
    {"recipe": "tuned"},
    {"settings": {"model.kv_method": "variable"}},
    {"settings": {"phase2.max_epochs": 3}, "epochs": EPOCHS[500][:3]},
    {"epochs": [(100 + n, 200 + n, 0.1) for n in range(4)]},
    {"recipe": "exact", "settings": {"mixer": "own_parts:GRUMixer"}},
]


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_both_languages_say_the_same_of_every_kind_of_run(tmp_path, options):
    found = runs(tmp_path, 100, 500, **options)
    for several in (found, found[1:]):
        english, japanese = write_report(several, "en"), write_report(several, "ja")
        assert numbers(english) == numbers(japanese)
        assert english.count("\n#") == japanese.count("\n#")
        assert not re.search(r"[ぁ-ん一-龥]", english)
        assert re.search(r"[ぁ-ん]", japanese)
        assert not re.search(r"[。）、]\*\*[^\s（。、:]", japanese)  # CommonMark does not close bold there
        for report in (english, japanese):
            assert not re.search(r"[{}]|\bNone\b|\bnan\b|\n\n\n", report)
    has_contexts = "mixer" not in options.get("settings", {})
    assert ("the original's layout" in english) == has_contexts
    copies = options.get("recipe") == "tuned"  # in validation, and not in training
    assert ("Validation is with copying, training without it" in english) == copies
    found[1].summary["phase1"]["context_method"] = "exact"
    assert ("; without copying) |" in model_card(found[1])) == copies


def test_the_report_follows_the_summary_and_names_the_reason_for_the_end_of_phase_1(tmp_path):
    (run,) = runs(tmp_path, 500)
    for reason, shown in {
        "plateau": "iteration 17 (plateau above 50%)",
        "max_iterations": "iteration 17 (limit reached)",
        "untrained": "not trained",
    }.items():
        run.summary["phase1"]["stop_reason"] = reason
        assert row(write_report([run]), "Stopped")[1] == shown
    run.summary["phase1"]["stop_reason"] = "converged"
    (strict,) = runs(tmp_path / "strict", 500, settings={"phase1.stop_rate": 0.995})
    assert row(write_report([strict]), "Stopped")[1] == "iteration 17 (converged ≥ 99.5%)"
    before, summary = write_report([run]), run.summary
    summary["phase2"] |= {"val_ppl": 123.4, "seconds_per_epoch": 77.0}
    summary["phase1"] |= {"effective_rank": 0.456, "iterations": 29}
    summary["caches_mib"]["total"], summary["provenance"]["device"] = 4321, "another card"
    after = write_report([run])
    for shown in ("123.4", "77 s", "45.6%", "29 iterations", "4,321", "another card"):
        assert shown not in before
        assert shown in after


def test_best_epoch_is_bold_and_the_rest_is_judged_up_to_the_stop(tmp_path):
    report = write_report(runs(tmp_path, 500))
    assert row(report, "**3**")[1:5] == ["**107.4**", "**179.2**", "**20.4%**", "**best**"]
    assert row(report, "2")[1:5] != row(report, "4")[1:5]
    assert "| 229.9 | 229.6 | 17.5% | improved |" in report
    assert "| 60.9 | 186.5 | 20.3% | worse |" in report
    assert "| 33.7 | 211.3 | 20.1% | worse; early stop |" in report
    assert "Epoch 3: val_ppl=179.2 → best (no_improve=0)" in report
    assert "Epoch 6: val_ppl=211.3 → worse (no_improve=3) → early stop" in report
    assert "early stopping worked as set" in report
    assert "weight decay 0.01 → 0.1 " in report
    settings = {"phase2.max_epochs": 3}  # a run to the limit claims no early stopping
    report = write_report(runs(tmp_path / "limit", 500, settings=settings, epochs=EPOCHS[500][:3]))
    assert "early stopping did not trigger" in report
    assert "worked as set" not in report
    assert "500 samples: val PPL was at its lowest at the last epoch.**" in report
    assert "Longer training" in report


@pytest.mark.parametrize(
    ("ppls", "verdict"),
    [((90, 201), "yes"), ((101, 201), "unclear"), ((90, 200), "unclear"), ((99.97, 200.03), "unclear")],
)
def test_overfitting_is_a_val_ppl_that_rises_while_train_ppl_falls(ppls, verdict):
    best, last = ({"epoch": n, "improved": n == 1, "train_ppl": ppls[0], "val_ppl": ppls[1]} for n in (1, 2))
    phase2 = {"best_epoch": 1, "train_ppl": 100, "val_ppl": 200, "epochs": [best, last]}
    assert overfitting(phase2) == verdict
    assert epoch_note({**phase2, "stop_reason": "max_epochs"}, last) == "worse"  # nothing stopped it


def test_what_is_said_of_overfitting_holds_also_where_val_ppl_is_as_low_again_or_rose_before(tmp_path):
    settings = {"phase2.max_epochs": 3}
    (tied,) = runs(
        tmp_path / "tied", 500, settings=settings, epochs=[(300, 220, 0.1), (200, 200, 0.1), (90, 200, 0.1)]
    )
    said = "no clear overfitting** after epoch 2: train PPL 200.0 → 90.0, val PPL 200.0 → 200.0."
    assert said in write_report([tied])
    (rose,) = runs(
        tmp_path / "rose", 500, settings=settings, epochs=[(300, 200, 0.1), (200, 210, 0.1), (90, 190, 0.1)]
    )
    report = write_report([rose])
    assert "lowest at the last epoch" in report
    assert "begun to rise" not in report


def test_a_comparison_is_only_of_several_runs_and_says_what_fell_rose_or_stayed(tmp_path):
    found = runs(tmp_path, 100, 500)
    assert "## Comparison" not in write_report(found[:1])
    report = write_report(found[::-1])
    assert "## Comparison: 100 samples vs 500 samples" in report
    assert "51.1% lower" in report
    assert "- Val PPL fell from 366.4 to 179.2, 51.1% lower." in report
    assert "train PPL fell from 1.84x to 1.67x, 9.6% lower." in report
    worse = [(row[0], 2 * row[1], row[2] / 2) for row in EPOCHS[100]]
    report = write_report(found[:1] + runs(tmp_path / "worse", 500, epochs=worse))
    assert "Val PPL did not fall: from 366.4 to 732.8, 100.0% higher" in report
    assert "train PPL rose" in report
    assert "val PPL did not fall (100.0% higher)" in report
    worse = [(row[0], 50 * row[1], row[2] / 2) for row in EPOCHS[100]]
    report = write_report(found[:1] + runs(tmp_path / "worst", 500, epochs=worse))
    assert len(re.findall(r"4,900\.0% higher", report)) == 5  # two rows, two observations, conclusion
    tied = runs(tmp_path / "tie", 100, 500, epochs=EPOCHS[500])
    tied[1].summary["phase2"] |= {"val_ppl": 179.21, "train_val_ratio": 1.6689}  # before: 179.20 and 1.6685
    report = write_report(tied)
    for said in (
        "Val PPL is the same within 0.1%: 179.2 and 179.2.",
        "Val Acc is the same within 0.1 points: 20.4% and 20.4%.",
        "Ratio is the same within 0.1%: 1.67x and 1.67x.",
    ):
        assert said in report
    assert "**100 samples, 500 samples: the same val PPL within 0.1%.**" in report
    tied[1].summary["phase2"]["train_val_ratio"] = 1.665  # as shown, the same
    for said in ("| **0.2% lower** |", "train PPL fell from 1.67x to 1.67x, 0.2% lower."):
        assert said in write_report(tied)
    tied[1].summary["phase2"] |= {"val_ppl": 179.13, "val_acc": 0.2045}  # which shows as 179.1 and 20.4%
    assert "the same within 0.1%: 179.2 and 179.1." in write_report(tied)
    assert " 0.0%" not in report
    tied[1].summary["phase2"]["best_epoch"] += 1
    assert "| **+1 epoch** |" in write_report(tied)
    first, second = (run.summary for run in found)
    assert "" not in observations(first, second)


def test_what_differs_between_runs_is_listed_for_each(tmp_path):
    alike = write_report(runs(tmp_path / "alike", 100, 500))
    assert "- **Date**: 2026-01-31\n" in alike
    assert "random seed 42; commit 0123abc" in alike
    assert "validated on different texts" not in alike

    found = runs(tmp_path, 100, 500)
    made = found[0].summary["provenance"]
    made |= {"seed": 7, "date": "2026-02-03", "device": "another card", "git_commit": None}
    made |= {"embeddings": {"table": "random"}}
    made |= {"data": {"source": "chitchat", "validation_fingerprint": "ee"}}
    assert "change" not in comparison_table([run.summary for run in found])  # as in the report
    report = write_report(found)
    for listed in (
        "**Date**: 100 samples: 2026-02-03; 500 samples: 2026-01-31",
        "100 samples: another card (python 3.11.9, torch 2.11.0); 500 samples: NVIDIA H100",
        "random seed 100 samples: 7; 500 samples: 42",
        "commit 100 samples: –; 500 samples: 0123abc",
        "**Data**: 100 samples: chitchat; 500 samples: ultrachat",
        "token table: 100 samples: random; 500 samples: gpt2",
        "validated on different texts",
        "*Last updated: 2026-02-03*",
    ):
        assert listed in report, listed
    assert "51.1%" not in report  # what cannot be compared is not
    assert "Observations" not in report


def test_runs_on_the_same_data_are_told_apart(tmp_path):
    folders = [sample_run(tmp_path / recipe, recipe=recipe) for recipe in ("exact", "tuned")]
    assert "## Comparison: 500 samples, exact vs 500 samples, tuned" in write_report(map(load_run, folders))
    changed = {"model.interval": 50, "data.validation_samples": 30}
    folders = [sample_run(tmp_path / "a"), sample_run(tmp_path / "b", settings=changed)]
    title = "## Comparison: 500 samples, interval 20 vs 500 samples, interval 50"
    assert title in write_report(map(load_run, folders))
    assert "500 samples (1) vs 500 samples (2)" in write_report(runs(tmp_path / "c", 100, 500, 500))


def test_settings_that_differ_are_named_also_where_samples_do(tmp_path):
    of = {"exact": 100, "tuned": 500}
    folders = [sample_run(tmp_path / recipe, count, recipe=recipe) for recipe, count in of.items()]
    report = write_report(map(load_run, folders))
    assert "## Comparison: 100 samples, exact vs 500 samples, tuned" in report
    assert "- The runs differ in their settings." in report
    assert "weight decay 2 → 4 " in report
    for others in (runs(tmp_path / "same", 100, 500), runs(tmp_path / "twice", 500, 500)):
        assert "differ in their settings" not in write_report(others)
    folders = [sample_run(tmp_path / f"seed{seed}", settings={"runtime.seed": seed}) for seed in (1, 2)]
    report = write_report(map(load_run, folders))
    assert "- The training tokens are the same (587,970).\n" in report
    assert "differ in their settings" not in report


def test_an_attention_with_its_own_slots_is_shown_with_these(tmp_path):
    (run,) = runs(tmp_path, 500)
    run.summary["context_window"]["offsets"] = [0, 4, 36]
    report = write_report([run])
    assert "every position attends 3 slots" in report
    assert "→ always 3 key-value slots" in report
    assert "→ the farthest slot lies 36 tokens back" in report
    assert "Position 50: [ctx[50], ctx[46], ctx[14]] (3 real + 0 zero)" in report
    run.summary["phase1"]["context_method"] = "exact"
    assert "attention reads 3 compressed context vectors" in model_card(run)


def test_proposals_for_a_file_are_ones_that_it_can_meet(tmp_path):
    settings = {"data.source": "file", "data.path": "my_chats.jsonl"}
    (run,) = runs(tmp_path, 47, preset="offline", settings=settings)
    run.summary["val_tokens"] = 658  # of which a wider window gets more
    report = write_report([run])
    assert "`--set model.interval=50`" in report
    assert "--samples 94" not in report
    assert "**Data**: file (my\\_chats.jsonl); " in report
    assert "add conversations to my\\_chats.jsonl" in report
    assert "give both the same `--set data.validation_samples=N" in report


@pytest.mark.parametrize(
    ("samples", "val_tokens", "proposed"),
    [
        (1100, 658, []),  # of 2,090 training conversations, and a window of 640 tokens
        (600, 2000, ["`--set model.interval=50`", "`--samples 1200`", "`--set model.max_contexts=64`"]),
    ],
)
def test_no_proposal_is_refused_for_its_window_or_its_samples(tmp_path, samples, val_tokens, proposed):
    (run,) = runs(tmp_path, samples, preset="ci")
    run.summary["val_tokens"] = val_tokens
    report = write_report([run])
    assert re.findall(r"`--(?:samples|set model\.(?:interval|max_contexts)).*?`", report) == proposed
    for too_much in ("3,200 tokens", "2,400 samples"):
        assert too_much not in report
    assert numbers(report) == numbers(write_report([run], "ja"))


def test_published_numbers_stand_beside_the_seed_settings_and_gpus_only_where_they_were_used(tmp_path):
    ours = write_report(runs(tmp_path / "a", 500))
    assert row(ours, "**Val PPL**")[1:] == ["**179.2**", "**175.7**"]
    assert row(ours, "Effective rank")[1:] == ["80.7%", "82.1%"]
    assert row(ours, "train_ctx")[1:] == ["575", "574", "574"]
    assert row(ours, "data loaded")[1:] == ["1.3 (1.6)", "0.0 (0.8)", "1.2", "0.0"]
    unpublished = write_report(runs(tmp_path / "c", 100))  # of 100 samples, sizes of caches
    assert row(unpublished, "train_ctx")[1:] == ["575", "120"]
    assert "| 7 | – | – | – |  | 46.1 | 193.1 | 20.9% |" in ours
    assert "published val PPL is 175.7; this run’s differs by +2.0%" in ours
    (near,) = runs(tmp_path / "near", 500)
    near.summary["phase2"]["val_ppl"] = 175.699
    assert "this run’s differs by +0.0%" in write_report([near])
    offline = write_report(runs(tmp_path / "b", 500, preset="offline", gpu=False))
    for absent in ("175.7", "Published (", "GPU"):
        assert absent not in offline
    assert row(offline, "Phase 1 done")[1:] == ["2.7 (3.0)"]


def test_published_runs_are_matched_by_what_matters():
    assert published_samples(build_config("colab", "published", 100)) == 100
    free = {"runtime.device": "cpu", "runtime.seed": 7, "runtime.threads": "2"}
    assert published_samples(build_config("colab", "published", 500, free)) == 500
    assert published_samples(build_config("colab", "published", 300)) is None
    for precision in ("bf16", "auto"):
        rounded = {"runtime.precision": precision}
        assert published_samples(build_config("colab", "published", 500, rounded)) is None
    assert published_samples(build_config("colab", "exact", 500)) is None
    for changed in ({"model.interval": 50}, {"phase2.learning_rate": 1e-4}):
        assert published_samples(build_config("colab", "published", 500, changed)) is None
    assert published_samples(build_config("offline", "published", 500)) is None


def test_slots_follow_the_formula_at_positions_that_fit_the_window_and_the_stream(tmp_path):
    assert example_positions(ModelConfig(), 587_970) == [50, 350, 3500]
    assert example_positions(ModelConfig(), 1000) == [50, 350, 999]
    assert example_positions(ModelConfig(), 30) == [29]
    assert example_positions(ModelConfig(interval=100), 587_970) == [250, 1750, 17_500]
    report = write_report(runs(tmp_path, 500))
    assert "Position 50: [ctx[50], ctx[30], ctx[10], 0, ..., 0] (3 real + 29 zero)" in report
    assert "Position 350: [ctx[350], ctx[330], ..., ctx[10], 0, ..., 0] (18 real + 14 zero)" in report
    assert "Position 3500: [ctx[3500], ctx[3480], ..., ctx[2880]] (32 real + 0 zero)" in report
    variable = write_report(runs(tmp_path / "v", 500, settings={"model.kv_method": "variable"}))
    assert "Position 50: [ctx[50], ctx[30], ctx[10]] (3 real, 29 masked)" in variable
    (run,) = runs(tmp_path / "tuned", 500, recipe="tuned")  # whose slots lie ever further apart
    run.summary["context_window"]["offsets"] = shapes(run.config)[1].offsets
    report = write_report([run])
    assert row(report, "Context interval (tokens)")[1:] == ["varies: slots 0 to 620 back"]
    assert "theoretical_max" not in report


def test_comparison_table_is_aligned(tmp_path):
    summaries = [run.summary for run in runs(tmp_path, 100, 500)]
    lines = comparison_table(summaries).splitlines()
    assert comparison_table(iter(summaries)).splitlines() == lines
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["100", "samples", "500", "samples", "change"]
    assert re.split(r" {2,}", lines[1]) == ["Val PPL", "366.4", "179.2", "51.1% lower"]
    assert [re.split(r" {2,}", line)[::3] for line in lines[1:]] == [
        ["Val PPL", "51.1% lower"],
        ["Val Acc", "+4.5 points"],
        ["Best Epoch", "same"],
        ["Val/Train Ratio", "9.6% lower"],
    ]
    assert "change" not in comparison_table(summaries[:1])
    assert comparison_table([*summaries, summaries[0]]).splitlines()[1].endswith("  same")  # last, first
    assert terminal_table([["会話", "1"], ["abcd", "2"]]) == "会話   1\nabcd   2"  # wide characters


def test_what_is_no_path_is_refused_and_a_run_is_told_to_have_one(tmp_path):
    (finished,) = runs(tmp_path, 500)
    for use in (load_run, load_trained, run_folders, lambda each: run_folders([each])):
        with pytest.raises(UserError, match=r"^Run is no path; .* has it as `path`"):
            use(finished)
    with pytest.raises(UserError, match=r"^int is no path"):
        run(build_config("ci"), out=5)


def test_an_unfinished_run_says_what_to_do(tmp_path):
    for missing in ("config.json", "summary.json", "metrics.jsonl"):
        folder = sample_run(tmp_path / missing)
        (folder / missing).unlink()
        with pytest.raises(
            UserError, match=f"{missing} is missing; make it again with `ctxkv run .*--out {folder}"
        ):
            load_run(folder)
    folder = sample_run(tmp_path / "unrecorded")
    (folder / "checkpoint" / "stages.json").unlink()
    with pytest.raises(
        UserError, match=r"no checkpoint/stages\.json; make it again with `ctxkv run .*--again`"
    ):
        load_run(folder)
    (folder / "summary.json").unlink()  # as in Phase 1, whose record is the first
    with pytest.raises(UserError, match="has not finished; finish it with `ctxkv run"):
        load_run(folder)


def test_unknown_language_and_no_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="language is 'fr'; allowed: en, ja"):
        write_report(runs(tmp_path, 500), "fr")
    with pytest.raises(UserError, match="no runs"):
        write_report([])
    with pytest.raises(UserError, match="no runs"):
        comparison_table([])


def test_text_from_outside_is_no_markup(tmp_path):
    """Neither in reports nor in model cards, and a table keeps its columns."""
    settings = {"data.source": "file", "data.path": HOSTILE}
    run = load_run(sample_run(tmp_path / "run", preset="ci", settings=settings))
    run.summary["provenance"] |= {"device": HOSTILE, "versions": {"torch": HOSTILE}}
    run.summary["phase1"]["context_method"] = "exact"
    for text in (write_report([run], "en"), write_report([run], "ja"), model_card(run)):
        assert "<script" not in text
        assert "<img" not in text
        assert literal(HOSTILE) in text
        for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
            columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(columns) == 1, table
    assert literal("a | b\n`c` <d> '$e$'") == r"a \| b \`c\` &lt;d&gt; '\$e\$'"
    assert literal("2026-01-31, cpu (x86, 2 threads)") == "2026-01-31, cpu (x86, 2 threads)"


@pytest.mark.parametrize("kv_method", ["fixed", "variable"])
def test_one_of_a_thing_is_no_plural(tmp_path, kv_method):
    one = {"model.max_contexts": 1, "model.kv_method": kv_method, "phase2.patience": 1}
    (run,) = runs(tmp_path, 1, settings=one, epochs=EPOCHS[500][:4])
    run.summary["phase1"]["context_method"] = "exact"
    for text in (write_report([run]), model_card(run), format_info(describe(run.config))):
        assert not re.search(
            r"\b1 (?:[a-z-]+ )*(?:slots|contexts|epochs|conversations|vectors|samples)\b", text
        )
    run.summary["samples"] = 1000
    assert "\n# Context-KV attention, 1,000 conversations\n" in model_card(run)


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("preset", ["colab", "offline"])
def test_the_method_is_expanded_where_it_is_first_named_and_the_original_linked_once(
    tmp_path, preset, language
):
    report = write_report(runs(tmp_path, 1, 500, preset=preset), language)
    assert re.search(r"OACD.{0,40}", report)[0].startswith(
        ("OACD (Origin-Anchored C", "OACD（Origin-Anchored C")
    )
    assert report.count("](https://github.com/rato-tokyo/new-llm)") == report.count("new-llm](") == 1
    assert "1 samples" not in report
    assert language == "ja" or "| 1 sample |" in report
