"""The explorers' own moves: steps, jumps, the marked epoch, runs found in a folder."""

import re

import pytest
from conftest import local_experiment
from sample_runs import EPOCHS, sample_run

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.views import explore, plots


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    settings = {**local_experiment(folder), "phase1.max_iterations": 3, "phase2.max_epochs": 1}
    return explore.open_run(run(build_config("ci", samples=8, settings=settings), folder / "run"))


def test_the_text_opens_at_the_position_itself(trained):
    window = plots.explore_window(trained, position=30)
    box, framed = re.search(
        r'<div [^>]*style="([^"]+)"><div>.*(outline:.+)', window.text.value, re.DOTALL
    ).groups()
    assert "column-reverse" in box  # its scroll starts at the end ...
    assert "height" in box
    assert len(re.findall("<span", framed)) == 2  # ... where the position's token and the next one are


def test_buttons_step_by_a_token_and_by_an_interval(trained):
    window = plots.explore_window(trained, position=30)
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


def test_choosing_a_token_moves_there(trained):
    window = plots.explore_window(trained, position=30)
    offered = dict(window.tokens.options)
    assert list(offered.values())[1:] == [30, 27, 24, 21]
    (label,) = [label for label, at in offered.items() if at == 24]
    assert re.fullmatch(r"24: '.+', \d+\.\d% of the attention", label)
    window.tokens.value = 24
    assert window.position.value == 24
    assert window.tokens.index == 0  # ready for the next choice
    assert "Position 24" in window.guesses.value


def test_clicking_a_token_moves_there(trained):
    window = plots.explore_window(trained, position=30)
    assert [at for _, at in window.near.options] == list(range(27, 34))  # an interval to either side
    assert (window.near.value, window.near.index) == (30, 3)
    window.near.index = 5  # what a click sets
    assert window.position.value == 32
    assert "Position 32" in window.guesses.value
    assert (window.near.value, window.near.options[window.near.index][1]) == (32, 32)
    assert [at for _, at in window.near.options] == list(range(29, 36))
    window.position.value = last = window.position.max
    assert [at for _, at in window.near.options] == list(range(last - 3, last + 1))
    window.split.value = "train"
    ids = trained.caches["train"].ids[last + 3 : last + 4]
    assert window.near.tooltips[6] == f"{last + 3:,}: {trained.tokenizer.decode(ids)!r}"


def test_every_token_has_a_button_that_can_be_seen_and_told_from_the_others():
    texts = plots._button_texts([" the", "\n", "  ", "$x", "the", " the"])
    assert [text.replace("\u200b", "") for text in texts] == ["the", r"\n", "␣␣", "$x", "the", "the"]
    assert len(set(texts)) == 6


def test_what_zero_slots_take_is_said(trained):
    window = plots.explore_window(trained, position=4)  # slots at 4, 1 and twice before the stream
    (ax,), (legend,) = window.figure.axes, window.figure.legends
    contexts, zeros = (text.get_text() for text in legend.get_texts())
    shares = [float(re.search(r"([\d.]+)% together", text)[1]) for text in (contexts, zeros)]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    heights = sorted((bar.get_x(), bar.get_height()) for bar in ax.patches)
    assert heights[2][1] == pytest.approx(heights[3][1])  # each as much as the next
    assert shares[1] == pytest.approx(heights[2][1] + heights[3][1], abs=0.06)


def test_all_runs_of_a_folder_are_explored_and_told_apart(tmp_path):
    for seed in (1, 2, 3):
        sample_run(tmp_path / f"run{seed}", 100, settings={"runtime.seed": seed})
    explorer = plots.explore_runs(tmp_path)
    assert [box.description for box in explorer.runs] == ["seed 1", "seed 2", "seed 3"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        plots.explore_runs(tmp_path / "empty")


def test_the_chosen_epoch_is_marked_in_the_plot_and_read_in_the_table(tmp_path):
    explorer = plots.explore_runs(sample_run(tmp_path / "run", 100))
    assert explorer.epoch.value == 3  # the best one
    explorer.epoch.value = 4
    (mark,) = [line for line in explorer.figure.axes[0].get_lines() if line.get_label() == "epoch 4"]
    assert set(mark.get_xdata()) == {4}
    assert f"{EPOCHS[100][3][1]:,.1f}" in explorer.values.value
    explorer.epochs.value = (1, 3)
    assert "epoch 4" not in [line.get_label() for line in explorer.figure.axes[0].get_lines()]


def test_long_names_leave_room_for_the_curves(tmp_path):
    long = [sample_run(tmp_path / ("x" * 60 + str(n)), 100) for n in range(2)]
    explorer = plots.explore_runs(long)
    assert [len(box.description) for box in explorer.runs] == [61, 61]
    assert max(len(text.get_text()) for text in explorer.figure.legends[0].get_texts()) < 70
