"""Figures of runs: the tests read curves and labels back from the axes."""

from itertools import pairwise

import matplotlib
import pytest
from matplotlib import style
from sample_runs import EPOCHS, sample_run

from ctxkv_lib.runs.published import PUBLISHED
from ctxkv_lib.views.figures import (
    OKABE_ITO,
    memory_by_stage,
    phase1_curves,
    ppl_curves,
    save,
    window_attention,
)

HOSTILE = r"$x$ $\bad{ <b> & _y_ | a name"


@pytest.fixture
def summaries():
    """Return the summaries of runs with 100 and 500 samples, by name."""
    return {f"{count} samples": sample_run(count).summary for count in (100, 500)}


def curves(ax, linestyle):
    """Return the points of all curves in one line style, by color."""
    lines = [
        line for line in ax.get_lines() if line.get_linestyle() == linestyle and len(line.get_xdata()) > 2
    ]
    return {line.get_color(): [*zip(*line.get_data(), strict=True)] for line in lines}


def labels(figure):
    """Return the texts in the legend and at the ends of lines."""
    (ax,) = figure.axes
    return [text.get_text().replace("\n", ": ") for text in [*figure.legends[0].get_texts(), *ax.texts]]


def test_training_is_dashed_validation_solid_and_a_ring_marks_the_best_epoch(summaries):
    (ax,) = ppl_curves(summaries).axes
    for color, rows in zip(OKABE_ITO, EPOCHS.values(), strict=False):
        assert curves(ax, "--")[color] == [(n, row[0]) for n, row in enumerate(rows, start=1)]
        assert curves(ax, "-")[color] == [(n, row[1]) for n, row in enumerate(rows, start=1)]
    rings = [line.get_data() for line in ax.get_lines() if line.get_markerfacecolor() == "none"]
    assert rings == [([3], [366.4]), ([3], [179.2])]
    assert ax.get_yscale() == "log"
    assert "100 samples: PPL 366.4, 15.9% right, epoch 3" in labels(ppl_curves(summaries))


def test_a_first_training_perplexity_does_not_flatten_the_other_curves(summaries):
    figure = ppl_curves(summaries)
    assert 580.3 < figure.axes[0].get_ylim()[1] < 1000 < EPOCHS[100][0][0]
    assert "↑ above the axis: training in epoch 1: 2,905" in labels(figure)


def test_eight_runs_look_different_and_have_a_legend(summaries):
    figure = ppl_curves({f"run {n}": summaries["500 samples"] for n in range(8)})
    lines = [line for line in figure.axes[0].get_lines() if line.get_label().startswith("run")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 8
    assert not figure.axes[0].texts


def test_labels_at_the_ends_of_lines_do_not_touch(summaries):
    figure = ppl_curves(dict.fromkeys("abc", summaries["500 samples"]))
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 3
    assert all(below.y1 < above.y0 for below, above in pairwise(boxes))


def test_n_grams_are_a_dotted_line_and_what_was_not_published_is_left_out(summaries):
    assert not any("n-grams" in text for text in labels(ppl_curves(summaries)))
    summaries["500 samples"]["ngrams"] = {"kneser_ney": {"val_ppl": 922.2}}
    figure = ppl_curves({**summaries, "the original": PUBLISHED[500]})
    (dotted,) = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
    assert dotted.get_ydata()[0] == 922.2 < figure.axes[0].get_ylim()[1]
    assert "500 samples: PPL of n-grams 922.2" in labels(figure)
    last = curves(figure.axes[0], "-")[OKABE_ITO[2]][-1]
    assert last == (7, 193.1)


def test_phase_1_is_drawn_with_the_rate_at_which_it_stops():
    lines = sample_run().phase1
    rate, loss, rank = phase1_curves({"this run": lines}, 0.9).axes
    assert rank.get_lines()[0].get_ydata()[0] == pytest.approx(100 * lines[0]["effective_rank"])
    assert rate.get_lines()[0].get_ydata()[-1] == pytest.approx(93)
    assert len(loss.get_lines()[0].get_xdata()) == len(lines)
    assert rate.get_lines()[1].get_ydata()[0] == 90


@pytest.mark.parametrize("gpu", [False, True])
def test_memory_bars_show_what_is_held_and_lines_show_the_peak(gpu):
    figure = memory_by_stage({"here": sample_run(gpu=gpu).summary["memory"], "L4": PUBLISHED[500]["memory"]})
    here, original = figure.axes
    held = [bar.get_width() for bar in here.patches]
    assert held == [1.3, 1.9, 2.7, 2.8, 2.9, 2.9] + ([0.0, 0.3, 0.4, 0.5, 0.6, 0.6] if gpu else [])
    assert [*here.get_lines()[0].get_xdata()] == [1.3, 1.6]
    assert [*here.get_lines()[-1].get_xdata()] == pytest.approx([0.6, 1.4] if gpu else [2.9, 3.2])
    assert [text.get_text() for text in here.get_yticklabels()][-2:] == ["first epoch", "last epoch"]
    assert len(original.get_lines()) == 0  # no peaks were published


def test_slots_before_the_stream_are_grey():
    (ax,) = window_attention([50, 30, 10, -10], [0.4, 0.3, 0.2, 0.1], 50, HOSTILE).axes
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([40, 30, 20, 10])
    assert len({bar.get_facecolor() for bar in ax.patches[:3]}) == 1
    assert ax.patches[3].get_facecolor() != ax.patches[0].get_facecolor()
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "20", "40", "60"]
    assert ax.get_lines()[0].get_ydata() == [25, 25]  # percent, if attention is uniform


def test_names_may_hold_anything_and_numbers_have_thousands_separators(summaries, tmp_path):
    figure = ppl_curves({HOSTILE: summaries["100 samples"]})
    save(figure, tmp_path / "a" / "curves.png")
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert figure.axes[0].yaxis.get_major_formatter()(1000) == "1,000"


def test_a_users_dark_style_changes_no_figure_and_is_kept(summaries):
    white = ppl_curves(summaries).png()
    with style.context("dark_background"):
        assert ppl_curves(summaries).png() == white
        assert matplotlib.rcParams["axes.facecolor"] == "black"
