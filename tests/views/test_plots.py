"""Interactive plots, driven through their controls and checked by what they draw."""

import csv
import html
import io
import re
import subprocess
import sys
from base64 import b64decode, b64encode

import pytest
import torch
from drawn import labels, line
from sample_runs import EPOCHS

from ctxkv_lib.errors import UserError
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views import markup, plots

PNG = b64encode(b"\x89PNG\r\n").decode()[:7]  # how a PNG in a page begins


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
    shown = ["500 samples: validation", "500 samples: best epoch", "epoch 3"]
    assert labels(ax) == shown  # the stop is out of sight
    assert list(line(ax, "500 samples: validation").get_xdata()) == [2, 3, 4, 5]
    assert line(ax, "500 samples: validation").get_color() == colour
    assert f"base64,{PNG}" in explorer.image.value
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


def test_nothing_chosen_is_said(two_runs):
    explorer = plots.explore_runs(two_runs)
    for box in explorer.runs:
        box.value = False
    assert explorer.figure is None
    assert explorer.image.layout.display == "none"
    assert "Choose at least one run" in explorer.message.value
    assert explorer.downloads.layout.display == "none"
    explorer.runs[1].value = True
    assert explorer.image.layout.display is None
    assert explorer.message.value == ""


def test_exports_hold_what_is_shown(two_runs):
    explorer = plots.explore_runs(two_runs)
    explorer.runs[0].value = False
    explorer.epochs.value = (2, 3)
    found = re.findall(r'download="(.+?)" href="data:.+?;base64,(.+?)"', explorer.downloads.value)
    files = {html.unescape(name): b64decode(content) for name, content in found}
    assert files["curves.png"].startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO(files["curves.csv"].decode())))
    assert [(row["run"], row["epoch"]) for row in rows] == [("500 samples", "2"), ("500 samples", "3")]
    assert float(rows[1]["val_ppl"]) == EPOCHS[500][2][1]


def test_no_runs_to_explore_is_an_error(tmp_path):
    with pytest.raises(UserError, match="at least one run folder"):
        plots.explore_runs([])
    with pytest.raises(UserError, match="not a folder"):
        plots.explore_runs([tmp_path / "none"])


def test_window_shows_the_models_own_attention(trained):
    explorer = plots.explore_window(trained, position=20)
    cache = trained.caches["val"]
    with torch.no_grad():
        expected = cache.attend(trained.model, torch.tensor([20]))[1][0]
    (ax,) = explorer.figure.axes
    heights = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in ax.patches)
    assert [x for x, _ in heights] == pytest.approx([0, 1, 2, 3])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "3", "6", "9"]
    assert [y for _, y in heights] == pytest.approx((100 * expected.mean(dim=0)).tolist())

    explorer.head.value = 2
    (ax,) = explorer.figure.axes
    heights = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in ax.patches)
    assert [y for _, y in heights] == pytest.approx((100 * expected[1]).tolist())


def test_window_follows_position_and_stream(trained):
    explorer = plots.explore_window(trained, position=4)
    named = [text.get_text().partition(":")[0] for text in explorer.figure.legends[0].get_texts()]
    assert named == ["contexts", "zero slots, before the stream"]
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


def test_memory_stands_beside_the_published_reports(two_runs):
    figure = plots.memory_timeline(load_run(two_runs[1]))
    ours, published = figure.axes
    assert [bar.get_width() for bar in published.containers[0]] == [1.2, 2.1, 5.6, 5.6]
    assert [bar.get_y() for bar in published.containers[0]] == [bar.get_y() for bar in ours.containers[0]][:4]
    assert ours.get_xlim() == published.get_xlim()
    assert published.get_xlim()[1] > 5.6
    assert "GiB" in published.get_xlabel()
    begun = plots.memory_timeline(load_run(two_runs[1]).summary["memory"][:1])
    assert len(begun.axes[0].containers[0]) == 1


def test_plots_need_no_pyplot():
    code = "import sys, ctxkv_lib.views.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
