"""Interactive plots, driven through their controls and checked by what they draw."""

import csv
import html
import io
import re
from base64 import b64decode

import pytest
import torch
from drawn import labels, line
from sample_runs import EPOCHS, sample_run

from ctxkv_lib.errors import UserError
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views import figures, plots
from ctxkv_lib.views.axes import LETTERS
from ctxkv_lib.views.markup import token_name

# The explorer of runs


@pytest.fixture
def runs(two_runs):
    return plots.explore_runs(two_runs)


def test_it_redraws_what_its_controls_say(runs):
    (ax,) = runs.figure.axes
    assert ax.get_yscale() == "log"
    assert line(ax, "500 samples: best epoch").get_xydata().tolist() == [[3, EPOCHS[500][2][1]]]
    assert line(ax, "500 samples: early stop").get_xydata().tolist() == [[6, EPOCHS[500][5][1]]]
    colour = line(ax, "500 samples: validation").get_color()
    assert [slider.description for slider in (runs.epochs, runs.epoch)] == ["Epochs", "Values at"]
    before = runs.page.value

    runs.log_scale.value = False
    runs.runs[0].value = False
    runs.curves["train"].value = False
    runs.epochs.value = (2, 5)
    (ax,) = runs.figure.axes
    assert ax.get_yscale() == "linear"
    shown = ["500 samples: validation", "500 samples: best epoch", "epoch 3"]
    assert labels(ax) == shown  # the stop is out of sight
    assert list(line(ax, "500 samples: validation").get_xdata()) == [2, 3, 4, 5]
    assert line(ax, "500 samples: validation").get_color() == colour
    assert "data:image/png" in runs.page.value
    assert runs.page.value != before


def test_accuracy_has_a_panel_of_its_own(runs):
    runs.curves["accuracy"].value = True
    ppl, accuracy = runs.figure.axes
    shown = list(line(accuracy, "100 samples: accuracy").get_ydata())
    assert shown == pytest.approx([100 * row[2] for row in EPOCHS[100]])
    assert "%" in accuracy.get_ylabel()
    runs.curves["train"].value = runs.curves["validation"].value = False
    assert [ax.get_ylabel() for ax in runs.figure.axes] == [accuracy.get_ylabel()]
    assert ppl.get_ylabel() == "Perplexity per token (log scale)"


def test_the_chosen_epoch_is_marked_in_the_plot_and_read_in_the_table(runs):
    assert runs.epoch.value == 3  # the best one
    runs.epoch.value = 4
    chosen = line(runs.figure.axes[0], "epoch 4")
    assert set(chosen.get_xdata()) == {4}
    assert chosen.get_linestyle() != figures.PARTS["n-grams"]["ls"]
    assert runs.figure.legends[0].get_texts()[-1].get_text() == "epoch 4"
    assert "Epoch 4" in runs.page.value
    train, val, accuracy = EPOCHS[100][3]
    for number in (f"{train:,.1f}", f"{val:,.1f}", f"{accuracy:.1%}", f"{val / train:.2f}x"):
        assert f">{number}<" in runs.page.value
    runs.epochs.value = (1, 3)
    assert "epoch 4" not in labels(runs.figure.axes[0])
    runs.runs[0].value = False
    assert f">{val:,.1f}<" not in runs.page.value


@pytest.mark.parametrize("kind", ["runs", "curves"])
def test_an_empty_choice_is_a_sentence(runs, kind):
    boxes = runs.runs if kind == "runs" else [*runs.curves.values()]
    for box in boxes:
        box.value = False
    assert runs.figure is None
    assert runs.page.value == "Choose at least one run and one curve."
    boxes[1].value = True
    assert "data:image/png" in runs.page.value


def test_downloads_hold_what_is_shown(runs):
    runs.runs[0].value = False
    runs.epochs.value = (2, 3)
    found = re.findall(r'download="(.+?)" .*?href="data:.+?;base64,(.+?)"', runs.page.value)
    files = {html.unescape(name): b64decode(content) for name, content in found}
    assert files["curves.png"].startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO(files["curves.csv"].decode())))
    assert [(row["run"], row["epoch"]) for row in rows] == [("500 samples", "2"), ("500 samples", "3")]
    assert float(rows[1]["val_ppl"]) == EPOCHS[500][2][1]


def test_all_runs_of_a_folder_are_explored_and_long_names_leave_room_for_the_curves(tmp_path):
    for n in range(2):
        sample_run(tmp_path / ("x" * 60 + str(n)), 100, epochs=EPOCHS[100][: 2 + 4 * n])
    explorer = plots.explore_runs(tmp_path)
    assert (explorer.epochs.max, explorer.epoch.value) == (6, 3)  # of the longer and better one
    assert ">not trained so long<" in explorer.page.value
    assert [len(box.description) for box in explorer.runs] == [61, 61]
    shown = [text.get_text() for text in explorer.figure.legends[0].get_texts()]
    assert max(len(line) for text in shown for line in text.splitlines()) <= LETTERS
    with pytest.raises(UserError, match="at least one run folder"):
        plots.explore_runs([])


# The explorer of a window


@pytest.fixture
def window(trained):
    return plots.explore_window(trained, position=30)


def bars(window):
    (ax,) = window.figure.axes
    return sorted((round(bar.get_x() + bar.get_width() / 2), bar.get_height()) for bar in ax.patches)


def test_it_shows_the_models_own_attention(trained, window):
    window.position.value = 20
    with torch.no_grad():
        expected = trained.caches["val"].attend(trained.model, torch.tensor([20]))[1][0]
    assert [slot for slot, _ in bars(window)] == [0, 1, 2, 3]
    assert [tick.get_text() for tick in window.figure.axes[0].get_xticklabels()] == ["0", "3", "6", "9"]
    assert [height for _, height in bars(window)] == pytest.approx((100 * expected.mean(dim=0)).tolist())
    window.head.value = 2
    assert [height for _, height in bars(window)] == pytest.approx((100 * expected[1]).tolist())
    assert window.figure.axes[0].get_title(loc="left") == "What position 20 attends: head 2"


def test_it_follows_position_and_stream(trained, window):
    assert window.figure.axes[0].get_title(loc="left") == "What position 30 attends: mean of all heads"
    assert window.text.value.count("of the attention") == 4
    target = trained.tokenizer.decode([int(trained.caches["val"].ids[31])])
    assert f"Next token: <b>{html.escape(token_name(target))}</b>" in window.page.value
    before = window.page.value
    window.split.value = "train"
    assert window.page.value != before
    longest = len(trained.caches["train"]) - 1
    assert window.position.max == longest
    window.position.value = longest
    window.split.value = "val"
    assert window.position.value == window.position.max == len(trained.caches["val"]) - 1
    for run in (trained.run, str(trained.run.path)):
        assert plots.explore_window(run, position=9, split="train").figure.axes


def test_it_says_what_zero_slots_take_and_its_text_opens_at_the_position_itself(window):
    window.position.value = 4  # slots at 4, 1 and twice before the stream
    assert window.text.value.count("of the attention") == 2
    names = [text.get_text() for text in window.figure.legends[0].get_texts()]
    assert [name.partition(":")[0] for name in names] == ["contexts", "zero slots, before the stream"]
    shares = [float(re.search(r"([\d.]+)% together", name)[1]) for name in names]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    heights = [height for _, height in bars(window)]
    assert heights[2] == pytest.approx(heights[3])  # each as much as the next
    assert shares[1] == pytest.approx(heights[2] + heights[3], abs=0.06)
    box, framed = re.search(
        r'<div class="text [^>]*style="([^"]+)"><div>.*(outline:.+)', window.text.value, re.DOTALL
    ).groups()
    assert "column-reverse" in box  # its scroll starts at the end ...
    assert len(re.findall("<span", framed)) == 1  # ... where the position's token and the next one are


def test_buttons_step_by_a_token_and_by_an_interval(window):
    assert sorted(window.steps) == [-3, -1, 1, 3]
    seen = []
    for step in (3, 1, -1, -3):
        window.steps[step].click()
        seen.append(window.position.value)
    assert seen == [33, 34, 33, 30]
    window.position.value = 1
    window.steps[-3].click()
    assert window.position.value == 0
    window.position.value = window.position.max
    window.steps[1].click()
    assert window.position.value == window.position.max


def test_choosing_an_attended_token_or_clicking_one_moves_there(trained, window):
    offered = dict(window.tokens.options)
    assert list(offered.values())[1:] == [30, 27, 24, 21]
    (label,) = [label for label, at in offered.items() if at == 24]
    assert re.fullmatch(r"24: '.+', \d+\.\d% of the attention", label)
    window.tokens.value = 24
    assert window.position.value == 24
    assert window.tokens.index == 0  # ready for the next choice
    assert "Position 24" in window.page.value
    window.position.value = 30
    assert [at for _, at in window.near.options] == list(range(27, 34))  # an interval to either side
    assert (window.near.value, window.near.index) == (30, 3)
    window.near.index = 5  # what a click sets
    assert window.position.value == 32
    assert "Position 32" in window.page.value
    assert (window.near.value, window.near.options[window.near.index][1]) == (32, 32)
    assert [at for _, at in window.near.options] == list(range(29, 36))
    window.position.value = last = window.position.max
    assert [at for _, at in window.near.options] == list(range(last - 3, last + 1))
    window.split.value = "train"
    ids = trained.caches["train"].ids[last + 3 : last + 4]
    assert window.near.tooltips[6] == f"{last + 3:,}: {token_name(trained.tokenizer.decode(ids))}"


def test_every_token_has_a_visible_button_with_a_text_of_its_own():
    assert plots._button_texts(["\u200b", " \u200b", "\0"]) == [
        "\\u200b",
        "␣\\u200b",
        "\\x00",
    ]
    texts = plots._button_texts([" the", "\n", "  ", "$x", "the", " the"])
    assert [text.replace("\u200b", "") for text in texts] == ["the", "↵", "␣␣", "$x", "the", "the"]
    assert len(set(texts)) == 6


@pytest.mark.parametrize(("position", "split"), [(-1, "val"), (10**6, "val"), (3, "test")])
def test_it_refuses_what_is_not_there(trained, position, split):
    with pytest.raises(UserError, match="allowed"):
        plots.explore_window(trained, position, split)


# Memory


def test_memory_stands_beside_the_published_report(tmp_path):
    run = load_run(sample_run(tmp_path / "run"))
    ours, published = plots.memory_timeline(run).axes
    assert [bars.get_label() for bars in ours.containers] == ["CPU now", "GPU now"]
    assert [bar.get_width() for bar in published.containers[0]] == [1.2, 2.1, 5.6, 5.6]
    assert [bar.get_y() for bar in published.containers[0]] == [bar.get_y() for bar in ours.containers[0]][:4]
    assert not any(line(published, "CPU peak").get_xdata() > 0)  # which was not published
    assert ours.get_xlim() == published.get_xlim()
    assert published.get_xlim()[1] > 5.6
    for stages in (1, 5):  # the only epoch once
        begun = plots.memory_timeline(run.summary["memory"][:stages])
        assert len(begun.axes[0].containers[0]) == stages
    cpu, gpu = (bars[0] for bars in ours.containers)
    assert cpu.get_y() + cpu.get_height() <= gpu.get_y()
