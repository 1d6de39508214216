"""Explorers: what a changed control draws."""

import pytest
from ipywidgets import HTML
from sample_runs import sample_run, write_run

from ctxkv_lib.errors import UserError
from ctxkv_lib.views.explore import explore_runs, explore_window


def page(explorer):
    (found,) = [child for child in explorer.children if isinstance(child, HTML)]
    return found.value


def test_controls_of_runs_change_figure_and_values(tmp_path):
    explorer = explore_runs([sample_run(100), write_run(tmp_path / "run", 500)])
    controls = explorer.controls
    assert controls["runs"].options == ("100 samples", "500 samples")
    assert (controls["last"].value, controls["epoch"].value) == (6, 3)
    assert "366.4" in page(explorer)
    assert "179.2" in page(explorer)
    controls["runs"].value = ("500 samples",)
    assert "366.4" not in page(explorer)
    controls["epoch"].value = 5
    assert "196.1" in page(explorer)
    (ax,) = explorer.figure.axes
    assert ax.get_yscale() == "log"
    controls["log"].value, controls["accuracy"].value, controls["last"].value = False, True, 4
    ppl, _accuracy = explorer.figure.axes
    assert ppl.get_yscale() == "linear"
    assert max(line.get_xdata()[-1] for line in ppl.get_lines() if len(line.get_xdata()) > 2) == 4
    assert page(explorer).startswith('<img style="max-width:100%" src="data:image/png;base64,')


def test_an_epoch_that_a_run_has_not_reached_is_left_out_of_the_values():
    short = sample_run(100, epochs=[(300.0, 400.0, 0.1)])
    explorer = explore_runs([short, sample_run(500)])
    explorer.controls["epoch"].value = 6
    assert page(explorer).count("<tr") == 2  # a header, and one run
    explorer.controls["runs"].value = ("100 samples",)
    assert "400.0" not in page(explorer)


def test_one_run_may_stand_alone_and_no_run_is_refused(tmp_path):
    assert explore_runs(sample_run()).controls["runs"].options == ("500 samples",)
    with pytest.raises(UserError, match="name at least one run folder"):
        explore_runs([])
    with pytest.raises(UserError, match="nothing"):
        explore_runs(tmp_path / "nothing")


def test_a_window_shows_its_tokens_with_the_attention_of_the_chosen_head(trained):
    explorer = explore_window(trained, position=20)
    cache, window = trained.caches["val"], trained.model.window
    for slot in window.slots(cache.ids.new_tensor([20]))[0].tolist():
        assert f'title="{slot}: ' in page(explorer)
    following = trained.tokenizer.decode([int(cache.ids[21])])
    assert f'border-bottom:2px solid">{following}<' in page(explorer)
    heights = [bar.get_height() for bar in explorer.figure.axes[0].patches]
    assert sum(heights) == pytest.approx(100, abs=0.01)
    weights = cache.attend(trained.model, cache.ids.new_tensor([20]).long())[1][0]
    for number, head in enumerate(weights.tolist(), start=1):
        explorer.controls["head"].value = f"head {number}"
        heights = [bar.get_height() for bar in explorer.figure.axes[0].patches]
        assert heights == pytest.approx([100 * share for share in head], abs=0.01)
    explorer.controls["head"].value = "head 2"
    explorer.controls["position"].value = 3  # with slots before the stream
    assert "What position 3 attends: head 2" in explorer.figure.axes[0].get_title(loc="left")
    assert page(explorer).count("of the attention") == 2


def test_a_position_that_is_not_there_is_refused(trained):
    last = len(trained.caches["val"]) - 1
    for position in (-1, last + 1, "first"):
        with pytest.raises(UserError, match=f"allowed in this validation stream: 0 to {last}"):
            explore_window(trained, position)
