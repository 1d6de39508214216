"""Interactive plots, driven through their controls and checked by what they draw."""

import csv
import subprocess
import sys
import time

import pytest
import torch
from conftest import local_experiment, tiny_ids, tiny_model
from matplotlib.colors import to_hex
from sample_runs import EPOCHS, phase1_lines, sample_run

from ctxkv_lib.config import build_config
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments.experiment import prepare, run
from ctxkv_lib.model.config import ModelConfig
from ctxkv_lib.runs.published import PUBLISHED
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.training.caches import StreamCache
from ctxkv_lib.training.recurrence import distinct_rows, exact_contexts
from ctxkv_lib.views import explore, markup, pictures, plots
from ctxkv_lib.views.live import SHARE, LiveCurves, describe

PNG = b"\x89PNG"


class Clock:
    """Seconds that pass only when a test, or a drawing, says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def two_runs(tmp_path):
    return [sample_run(tmp_path / f"run{samples}", samples) for samples in (100, 500)]


@pytest.fixture
def epochs(two_runs):
    """Phase 2 lines of metrics.jsonl by number of samples."""
    runs = {100: load_run(two_runs[0]), 500: load_run(two_runs[1])}
    return {n: [line for line in run.metrics if line["stage"] == "phase2"] for n, run in runs.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a second, and what it takes to look inside."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {**local_experiment(folder), "phase1.max_iterations": 12, "phase2.max_epochs": 2}
    return explore.open_run(run(build_config("ci", samples=8, settings=settings), folder / "run"))


def line(ax, label):
    (found,) = [drawn for drawn in ax.get_lines() if drawn.get_label() == label]
    return found


def labels(ax):
    return [drawn.get_label() for drawn in ax.get_lines()]


# LiveCurves


def test_live_curves_print_lines_outside_a_notebook(capsys, epochs):
    live = LiveCurves()
    for metric in (phase1_lines()[0], *epochs[500][:3]):
        live(metric)
    live({**epochs[500][3], "samples": 500})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Phase 1, iteration 2: loss 5.450, 0% of positions converged"
    assert printed[3] == "Phase 2, epoch 3: train PPL 107.4, val PPL 179.2, val acc 20.4%, best so far"
    assert printed[4].startswith("500 samples, Phase 2, epoch 4")
    assert printed[4].endswith("1 without improvement")
    assert live.figure is None


def test_live_curves_end_with_everything_that_came(epochs):
    live = LiveCurves(stop_rate=0.8, notebook=True)
    before = live.image.value
    for metric in phase1_lines():
        live(metric)
    live.finish()
    rate, _ = live.figure.axes
    assert list(line(rate, "this run").get_xdata()) == list(range(2, 18))
    assert set(line(rate, "stop at 80%").get_ydata()) == {80}
    assert live.image.value[:4] == PNG
    assert live.image.value != before
    for metric in epochs[500]:
        live(metric)
    live.finish()
    (ax,) = live.figure.axes
    assert list(line(ax, "this run: train").get_ydata()) == [row[0] for row in EPOCHS[500]]
    assert list(line(ax, "this run: validation").get_ydata()) == [row[1] for row in EPOCHS[500]]
    assert "Phase 2, epoch 6" in live._status.value


def test_live_curves_tell_the_runs_of_a_comparison_apart(epochs):
    live = LiveCurves(notebook=True)
    for samples in (100, 500):
        for metric in epochs[samples]:
            live({**metric, "samples": samples})
    live.finish()
    (ax,) = live.figure.axes
    assert list(line(ax, "100 samples: validation").get_ydata()) == [row[1] for row in EPOCHS[100]]
    assert list(line(ax, "500 samples: validation").get_ydata()) == [row[1] for row in EPOCHS[500]]


def test_drawing_costs_less_than_its_share(monkeypatch):
    clock, drawn = Clock(), []

    def slow_draw(self, figure, dpi):
        clock.now += 0.5
        drawn.append(clock.now)
        self.figure = figure

    monkeypatch.setattr(LiveCurves, "_draw", slow_draw)
    live = LiveCurves(notebook=True, clock=clock)
    drawn.clear()
    began = clock.now
    for iteration in range(2, 1200):
        live({**phase1_lines()[0], "iteration": iteration})
        clock.now += 0.1
        assert 0.5 * len(drawn) <= SHARE * (clock.now - began)
    assert len(drawn) == 4  # one every 25 s, in 122 s


def test_a_real_drawing_is_counted():
    live = LiveCurves(notebook=True)
    live._redraw_seconds = 0.0
    live(phase1_lines()[0])
    draft = live.figure
    began = time.perf_counter()
    live._draw(live._draft(), 80)
    cost = time.perf_counter() - began
    assert live.spent > cost / 10
    assert [ax.get_ylabel() for ax in draft.axes] == ["Converged positions (%)", "OACD loss (no unit)"]
    spent = live.spent
    live(phase1_lines()[1])
    assert live.figure is not draft  # by the call of _draw above
    assert live.spent - spent < live._redraw_seconds  # too early for another


def test_a_training_is_followed_and_resumed(tiny_config, tmp_path):
    first = LiveCurves(notebook=True)
    prepare(tiny_config, tmp_path / "run", first)
    first.finish()
    assert len(first.figure.axes) == 2
    second = LiveCurves(notebook=True)
    finished = run(tiny_config, tmp_path / "run", second)
    second.finish()
    assert list(second._lines["phase1"]["this run"]) == finished.phase1
    vals = [each["val_ppl"] for each in finished.summary["phase2"]["epochs"]]
    assert list(line(second.figure.axes[0], "this run: validation").get_ydata()) == vals


def test_preparing_makes_what_a_run_needs_and_no_more(tiny_config, tmp_path, monkeypatch):
    from ctxkv_lib.experiments import contexts

    prepared = prepare(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(contexts, "_make_caches", None)  # done: not to be made again
    finished = run(tiny_config, tmp_path / "run")
    assert finished.summary["phase1"] == prepared.record["phase1"]


def test_describe_names_stage_and_step():
    assert describe(phase1_lines()[-1]).startswith("Phase 1, iteration 17: loss")


# explore_runs


def test_explorer_redraws_what_its_controls_say(two_runs):
    explorer = plots.explore_runs(two_runs)
    (ax,) = explorer.figure.axes
    assert ax.get_yscale() == "log"
    assert line(ax, "500 samples: best epoch").get_xydata().tolist() == [[3, EPOCHS[500][2][1]]]
    assert line(ax, "500 samples: early stop").get_xydata().tolist() == [[6, EPOCHS[500][5][1]]]
    colour = line(ax, "500 samples: validation").get_color()
    before = explorer.image.value

    explorer.log_scale.value = False
    explorer.runs[0].value = False
    explorer.curves["train"].value = False
    explorer.epochs.value = (2, 5)
    (ax,) = explorer.figure.axes
    assert ax.get_yscale() == "linear"
    assert labels(ax) == ["500 samples: validation", "500 samples: best epoch"]  # the stop is out of sight
    assert list(line(ax, "500 samples: validation").get_xdata()) == [2, 3, 4, 5]
    assert line(ax, "500 samples: validation").get_color() == colour
    assert explorer.image.value[:4] == PNG
    assert explorer.image.value != before


def test_explorer_shows_accuracy_in_a_panel_of_its_own(two_runs):
    explorer = plots.explore_runs(two_runs)
    explorer.curves["accuracy"].value = True
    ppl, accuracy = explorer.figure.axes
    shown = list(line(accuracy, "100 samples: accuracy").get_ydata())
    assert shown == pytest.approx([100 * row[2] for row in EPOCHS[100]])
    assert "%" in accuracy.get_ylabel()
    explorer.curves["train"].value = explorer.curves["validation"].value = False
    assert [ax.get_ylabel() for ax in explorer.figure.axes] == [accuracy.get_ylabel()]
    assert ppl.get_ylabel() == "Perplexity per token (log scale)"


def test_values_follow_the_slider(two_runs):
    explorer = plots.explore_runs(two_runs)
    explorer.epoch.value = 4
    assert "Epoch 4" in explorer.values.value
    train, val, accuracy = EPOCHS[100][3]
    for number in (f"{train:,.1f}", f"{val:,.1f}", f"{accuracy:.1%}", f"{val / train:.2f}x"):
        assert number in explorer.values.value
    explorer.runs[0].value = False
    assert f"{val:,.1f}" not in explorer.values.value


def test_nothing_chosen_is_said(two_runs, tmp_path):
    explorer = plots.explore_runs(two_runs)
    for box in explorer.runs:
        box.value = False
    assert explorer.figure is None
    assert explorer.image.layout.display == "none"
    assert "Choose at least one run" in explorer.message.value
    explorer.save_png.click()
    assert not (tmp_path / "explored" / "curves.png").exists()
    explorer.runs[1].value = True
    assert explorer.image.layout.display is None
    assert explorer.message.value == ""


def test_exports_hold_what_is_shown(two_runs, tmp_path):
    explorer = plots.explore_runs(two_runs)
    explorer.runs[0].value = False
    explorer.epochs.value = (2, 3)
    explorer.save_png.click()
    explorer.save_csv.click()
    assert (tmp_path / "explored" / "curves.png").read_bytes()[:4] == PNG
    assert str(tmp_path / "explored" / "curves.csv") in explorer.message.value
    with (tmp_path / "explored" / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["epoch"]) for row in rows] == [("500 samples", "2"), ("500 samples", "3")]
    assert float(rows[1]["val_ppl"]) == EPOCHS[500][2][1]


def test_no_runs_to_explore_is_an_error(tmp_path):
    with pytest.raises(UserError, match="at least one run folder"):
        plots.explore_runs([])
    with pytest.raises(UserError, match="not a folder"):
        plots.explore_runs([tmp_path / "none"])


# explore_window


def test_window_shows_the_models_own_attention(trained):
    explorer = plots.explore_window(trained, position=20)
    cache = trained.caches["val"]
    with torch.no_grad():
        expected = cache.attend(trained.model, torch.tensor([20]))[1][0]
    (ax,) = explorer.figure.axes
    heights = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in ax.patches)
    assert [x for x, _ in heights] == pytest.approx([0, 3, 6, 9])
    assert [y for _, y in heights] == pytest.approx((100 * expected.mean(dim=0)).tolist())

    explorer.head.value = 2
    (ax,) = explorer.figure.axes
    heights = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in ax.patches)
    assert [y for _, y in heights] == pytest.approx((100 * expected[1]).tolist())


def test_window_follows_position_and_stream(trained):
    explorer = plots.explore_window(trained, position=4)
    assert [text.get_text() for text in explorer.figure.axes[0].get_legend().get_texts()] == [
        "contexts",
        "before the stream: zeros",
    ]
    assert explorer.text.value.count("of the attention") == 2  # positions 4 and 1
    before = explorer.image.value
    explorer.position.value = 30
    assert "position 30 attends" in explorer.figure.axes[0].get_title(loc="left")
    assert explorer.text.value.count("of the attention") == 4
    assert explorer.image.value != before
    target = trained.tokenizer.decode([int(trained.caches["val"].ids[31])])
    assert f"Next token: <b>{markup._quoted(target)}</b>" in explorer.guesses.value

    explorer.split.value = "train"
    longest = len(trained.caches["train"]) - 1
    assert explorer.position.max == longest
    explorer.position.value = longest
    explorer.split.value = "val"
    assert explorer.position.value == explorer.position.max == len(trained.caches["val"]) - 1


def test_window_takes_a_finished_run_too(trained):
    assert plots.explore_window(trained.run, position=9, split="train").figure.axes


@pytest.mark.parametrize(("position", "split"), [(-1, "val"), (10**6, "val"), (3, "test")])
def test_window_refuses_what_is_not_there(trained, position, split):
    with pytest.raises(UserError, match="allowed"):
        plots.explore_window(trained, position, split)


def test_tokens_are_escaped():
    window = explore.Window(
        position=1,
        start=0,
        pieces=["<b>", "a\nb"],
        slots=torch.tensor([1, -1]),
        weights=torch.ones(1, 2) / 2,
        target="<i>",
        guesses=[("&", 0.5)],
    )
    text = markup.attended_text(window, [0.5, 0.5])
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    assert "a⏎\nb" in text
    assert "&amp;" in markup.guesses_line(window)
    assert "&lt;b&gt;" in markup.token_boundaries(["<b>"])
    assert "<td" in markup.table(["x"], [["<td"]]).replace("&lt;td", "")


def test_every_cell_of_a_table_has_its_own_colours():
    content = markup.table(["a", "b"], [["1", "2"]])
    assert content.count("background:#ffffff;color:#1f2430") == 4


# memory_timeline


def test_memory_stands_beside_the_published_reports(two_runs):
    figure = plots.memory_timeline(load_run(two_runs[1]))
    ours, seed = figure.axes
    assert [bar.get_width() for bar in seed.containers[0]] == [1.2, 2.1, 5.6, 5.6]
    assert [bar.get_y() for bar in seed.containers[0]] == [bar.get_y() for bar in ours.containers[0]][:4]
    assert ours.get_xlim() == seed.get_xlim()
    assert seed.get_xlim()[1] > 5.6
    assert "GiB" in seed.get_xlabel()
    begun = plots.memory_timeline(load_run(two_runs[1]).summary["memory"][:1])
    assert len(begun.axes[0].containers[0]) == 1


# the figures of the notebooks


def test_token_lengths_count_every_conversation():
    (ax,) = pictures.token_lengths(torch.tensor([10, 20, 20, 400])).axes
    assert sum(bar.get_height() for bar in ax.patches) == 4
    assert {text.get_text() for text in ax.get_legend().get_texts()} >= {
        "median: 20 tokens",
        "mean: 112 tokens",
    }


def test_window_map_has_the_published_counts():
    (ax,) = pictures.window_map(ModelConfig(), [50, 350, 3500]).axes
    for position, real in ((50, 3), (350, 18), (3500, 32)):
        assert len(line(ax, f"{position}: contexts").get_xdata()) == real
        assert len(line(ax, f"{position}: before the stream").get_xdata()) == 32 - real
    assert list(line(ax, "50: contexts").get_xdata()) == [0, 20, 40]


def test_spectrum_names_the_effective_rank():
    even = torch.full((8,), 1 / 8)
    (ax,) = pictures.spectrum({"even": even}).axes
    assert ax.get_lines()[0].get_label() == "even: effective rank 8 of 8 (100%)"


def test_clouds_mark_the_centroid():
    points = torch.randn(50, 6) + 3
    for ax in pictures.context_clouds({"a": points, "b": points}).axes:
        (x,), _ = line(ax, "centroid").get_data()
        assert x > 5  # the strongest direction is that of the mean, which has length 3 * sqrt(6)


def test_heatmap_and_mean_show_the_same_attention():
    weights = torch.rand(3, 4)
    figure = pictures.attention_by_distance(weights, interval=20)
    above, below = figure.axes[:2]
    assert above.images[0].get_array().tolist() == (100 * weights).tolist()
    assert [bar.get_height() for bar in below.patches] == pytest.approx((100 * weights.mean(0)).tolist())


def test_overfitting_is_the_ratio_of_the_ppls():
    (ax,) = pictures.overfitting({"seed": PUBLISHED[500]["phase2"]["epochs"]}).axes
    ratios = list(line(ax, "seed").get_ydata())
    assert len(ratios) == 7  # the eighth epoch was not published
    assert ratios[4] == pytest.approx(175.7 / 78.4)


def test_settings_are_compared_with_the_base():
    results = {"base": [100.0, 110.0], "better": [84.0], "worse": [126.0]}
    (ax,) = pictures.settings_summary(results, "base").axes
    notes = [text.get_text() for text in ax.texts]
    assert notes == ["105.0", "84.0  (-20.0%)", "126.0  (+20.0%)"]
    assert to_hex(line(ax, "better").get_color()) != to_hex(line(ax, "worse").get_color())
    assert list(line(ax, "base: spread").get_xdata()) == [100, 110]


def test_cache_sizes_and_passes_show_their_numbers():
    (ax,) = pictures.cache_sizes({"here": {"total": 2.0}, "seed": {"total": 8.0}}).axes
    assert [bar.get_width() for bar in ax.patches] == [2.0, 8.0]
    (ax,) = pictures.pass_curve([0.5, 0.2, 0.1, 0.01]).axes
    assert line(ax, "published passes").get_xydata().tolist() == [[3, 0.1]]


def test_every_axis_of_every_figure_has_a_name(trained):
    window = explore.attended_window(trained, "val", 30)
    drawn = [
        pictures.token_lengths(torch.tensor([10, 20])),
        pictures.window_map(ModelConfig(), [50]),
        pictures.context_clouds({"a": torch.randn(9, 3)}),
        pictures.spectrum({"a": torch.full((4,), 0.25)}),
        pictures.pass_curve([0.5, 0.1]),
        pictures.cache_sizes({"here": {"total": 2.0}}),
        pictures.attention_by_distance(torch.rand(2, 4), 20),
        pictures.window_attention(window, window.weights.mean(dim=0)),
        pictures.overfitting({"a": PUBLISHED[100]["phase2"]["epochs"]}),
        pictures.settings_summary({"base": [1.0]}, "base"),
    ]
    for figure in drawn:
        assert figure.get_facecolor() == (1, 1, 1, 1)
        for ax in figure.axes:
            assert ax.get_xlabel() or ax.get_label() == "<colorbar>"
            assert ax.get_ylabel() or any(tick.get_text() for tick in ax.get_yticklabels())


# the numbers behind them


def test_passes_come_closer_to_the_exact_contexts(trained):
    cache = trained.caches["val"]
    errors = explore.pass_errors(trained.model, cache, trained.run.config.phase1, len(cache))
    assert errors[0] > errors[20] > errors[60]
    assert errors[-1] < 1e-9  # pass k has read k tokens, so that the last one has read them all
    embeddings, tokens = distinct_rows(trained.model, trained.caches["val"].ids[:-1])
    half = trained.model.context_block.project_tokens(embeddings)
    exact, _ = exact_contexts(trained.model.context_block, half, tokens, 1e-5)
    torch.testing.assert_close(exact, trained.caches["val"].contexts, atol=1e-4, rtol=0)


def test_attention_by_slot_averages_full_windows_only(trained):
    weights = explore.attention_by_slot(trained, most=10**6)
    positions = torch.arange(9, len(trained.caches["val"]))
    with torch.no_grad():
        expected = trained.caches["val"].attend(trained.model, positions)[1].mean(dim=0)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))


def test_attention_by_slot_needs_a_full_window(trained):
    model = tiny_model(max_contexts=64)
    short = StreamCache(tiny_ids(20).int(), torch.zeros(20, 16))
    lacking = explore.Trained(trained.run, model, trained.tokenizer, {"val": short})
    with pytest.raises(UserError, match="No position has a full window"):
        explore.attention_by_slot(lacking)


def test_corpus_lengths_add_up(trained):
    corpus = explore.load_corpus(trained.run.config)
    assert int(corpus.lengths("train").sum()) == trained.run.summary["train_tokens"]
    assert len(corpus.lengths("val")) == 2
    pieces = corpus.pieces("train", 1, most=10**6)
    assert "".join(pieces) == corpus.conversations["train"].texts()[1]
    rows = explore.count_rows(trained.run.config, corpus)
    assert rows[1][1:] == [f"{trained.run.summary['train_tokens']:,}", "587,970"]


def test_trace_says_what_each_epoch_meant(two_runs):
    notes = [row[-1] for row in explore.epoch_rows(load_run(two_runs[1]))]
    assert notes[2] == "better: weights kept"
    assert notes[-1] == "patience of 3 is used up: stop"


def test_predictions_are_the_models_own(trained):
    (row,) = explore.prediction_rows(trained, [30])
    cache = trained.caches["val"]
    with torch.no_grad():
        hidden, _ = cache.attend(trained.model, torch.tensor([30]))
        best = int(trained.model.logits(hidden).argmax())
    assert row[2].startswith(repr(trained.tokenizer.decode([best])))
    assert row[3] == ("yes" if best == int(cache.ids[31]) else "no")


def test_plots_need_no_pyplot():
    code = "import sys, ctxkv_lib.views.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
