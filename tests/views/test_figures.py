"""Figures, through what they draw rather than through pixels."""

import subprocess
import sys

import pytest
from drawn import line
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from sample_runs import EPOCHS, phase1_lines, sample_run
from test_rooms import FLOORS

from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.runs.published import PUBLISHED, PUBLISHED_PHASE1
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views import figures
from ctxkv_lib.views.axes import OKABE_ITO, save
from ctxkv_lib.views.diagram import ROOMS, architecture, parameter_counts, rooms


def summaries(tmp_path, *samples, **options):
    return [load_run(sample_run(tmp_path / f"run{n}", n, **options)).summary for n in samples]


def texts(figure):
    written = [text.get_text() for ax in figure.axes for text in ax.texts]
    return written + [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def all_figures(tmp_path):
    two = summaries(tmp_path, 100, 500)
    return [
        figures.ppl_curves(two),
        figures.phase1_curves({"500 samples": phase1_lines()}),
        figures.memory_by_stage(two),
    ]


def test_ppl_curves_draw_each_epoch_and_mark_the_best_and_the_stop(tmp_path):
    (ax,) = figures.ppl_curves(summaries(tmp_path, 100, 500)).axes
    assert ax.get_yscale() == "log"
    for samples, rows in EPOCHS.items():
        name = f"{samples} samples"
        assert list(line(ax, f"{name}: train").get_ydata()) == [row[0] for row in rows]
        assert list(line(ax, f"{name}: validation").get_xdata()) == [1, 2, 3, 4, 5, 6]
        assert line(ax, f"{name}: train").get_linestyle() == "--"
        assert line(ax, f"{name}: best epoch").get_xydata().tolist() == [[3, rows[2][1]]]
        assert line(ax, f"{name}: early stop").get_xydata().tolist() == [[6, rows[5][1]]]


def test_ppl_curves_write_the_best_value_and_name_every_run(tmp_path):
    written = texts(figures.ppl_curves(summaries(tmp_path, 100, 500)))
    named = {"100 samples\nepoch 3: PPL 366.4", "500 samples\nepoch 3: PPL 179.2"}
    assert {*named, "train", "validation"} <= set(written)


def test_ppl_curves_without_an_early_stop_mark_none(tmp_path):
    rows = EPOCHS[500][:3]
    runs = summaries(tmp_path, 500, settings={"phase2.max_epochs": 3}, epochs=rows)
    figure = figures.ppl_curves(runs)
    assert not [drawn for drawn in figure.axes[0].get_lines() if "early stop" in drawn.get_label()]
    assert "early stop" not in texts(figure)
    assert "early stop" in texts(figures.ppl_curves(summaries(tmp_path / "stopped", 500)))


def test_six_like_runs_have_six_colours_and_no_text_among_their_curves(tmp_path):
    figure = figures.ppl_curves(summaries(tmp_path, *range(501, 507)))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (ax,), (legend,) = figure.axes, figure.legends
    assert not ax.texts
    assert not legend.get_window_extent(renderer).overlaps(ax.get_window_extent(renderer))
    assert len({drawn.get_color() for drawn in ax.get_lines()}) == 6


def test_published_runs_are_drawn_without_their_missing_epoch():
    (ax,) = figures.ppl_curves([PUBLISHED[500]], ["published"]).axes
    assert list(line(ax, "published: validation").get_xdata()) == [1, 2, 3, 4, 5, 6, 7]
    assert not [drawn for drawn in ax.get_lines() if "early stop" in drawn.get_label()]


def test_runs_of_equal_size_are_told_apart():
    runs = [{"samples": 500}, {"samples": 1000}, {"samples": 500}]
    assert figures.run_labels(runs) == ["500 samples (1)", "1,000 samples", "500 samples (2)"]


def test_phase1_curves_show_percent_the_stop_line_and_the_loss():
    lines = phase1_lines()
    rate, loss = figures.phase1_curves({"500 samples": lines}, stop_rate=0.8).axes
    assert list(line(rate, "500 samples").get_xdata()) == list(range(2, 18))
    assert line(rate, "500 samples").get_ydata()[-1] == pytest.approx(93)
    assert set(line(rate, "stop at 80%").get_ydata()) == {80}
    assert list(line(loss, "500 samples").get_ydata()) == [each["loss"] for each in lines]
    assert loss.get_yscale() == "log"


def test_phase1_curves_leave_out_missing_values_and_bear_negative_losses():
    published = [*PUBLISHED_PHASE1[500], {"stage": "phase1", "iteration": 19, "loss": -0.1}]
    rate, loss = figures.phase1_curves({"published": published}).axes
    assert list(line(rate, "published").get_xdata()) == [7, 12, 15, 18]
    assert loss.get_yscale() == "linear"


def test_memory_shows_first_and_last_epoch_and_the_peak(tmp_path):
    figure = figures.memory_by_stage(summaries(tmp_path, 100, 500))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["100 samples", "500 samples"]
    ax = figure.axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[-2:] == ["first epoch", "last epoch"]
    assert len(names) == 6
    assert [bar.get_width() for bar in ax.containers[0]][:2] == [1.3, 1.9]
    assert list(line(ax, "GPU peak").get_xdata()) == pytest.approx([0.8, 1.1, 1.2, 1.3, 1.4, 1.4])


def test_memory_without_a_gpu_shows_none(tmp_path):
    figure = figures.memory_by_stage(summaries(tmp_path, 100, gpu=False))
    assert not [text for text in texts(figure) if "GPU" in text]
    assert len(figure.axes[0].containers) == 1


def test_every_axis_is_labelled_and_the_background_is_set(tmp_path):
    for figure in all_figures(tmp_path):
        assert figure.get_facecolor() == (1, 1, 1, 1)
        assert all(ax.get_xlabel() for ax in figure.axes)
        assert all(ax.get_ylabel() for ax in figure.axes if any(t.get_text() for t in ax.get_yticklabels()))


def test_architecture_takes_its_numbers_from_the_config():
    published = " ".join(texts(architecture(ModelConfig())))
    for number in ("640 tokens", "50,257 × 768", "i − 620", "6,301,440", "262,912", "8 heads over 32"):
        assert number in published
    other = " ".join(texts(architecture(ModelConfig(interval=50, max_contexts=4, num_heads=4))))
    for number in ("200 tokens", "i − 150", "4 heads over 4"):
        assert number in other
    assert "620" not in other


@pytest.mark.parametrize("max_contexts", [1, 2, 3, 4])
def test_architecture_draws_no_slot_that_does_not_exist(max_contexts):
    written = texts(architecture(ModelConfig(max_contexts=max_contexts)))
    assert len([text for text in written if text == "i" or text.startswith("i − ")]) == max_contexts


def test_parameters_of_the_parts_add_up():
    count = parameter_counts(ModelConfig())
    assert sum(count.values()) == 45_163_264
    assert count["attention"] + count["feed_forward"] == 6_301_440
    other = ModelConfig(slot_bias="near")
    assert sum(parameter_counts(other).values()) == other.parameter_counts()["total"]


@pytest.mark.parametrize("figure", [architecture(ModelConfig()), rooms()], ids=["architecture", "rooms"])
def test_text_of_a_drawing_stays_on_the_page_and_touches_no_other(figure):
    renderer, page = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts if text.get_text()]
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_every_room_is_drawn_on_its_floor():
    floors = [name.removesuffix("/").removesuffix(".py") for name in ROOMS]
    above = FLOORS.index("config") + 1
    assert floors == [
        "front door",
        *FLOORS[1:above],
        "ground",
    ]  # without __main__; the ground has several files
    assert {*ROOMS, ", ".join(" ".join(FLOORS[above:-1]).split()), f"{FLOORS[-1]}/"} <= set(texts(rooms()))


def test_colours_are_all_different():
    assert len({to_rgb(colour) for colour in OKABE_ITO}) == 6


def test_save_writes_a_whole_png_and_nothing_else(tmp_path):
    path = save(Figure(facecolor="white"), tmp_path / "figures" / "empty.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [each.name for each in path.parent.iterdir()] == ["empty.png"]


def test_figures_need_no_pyplot():
    code = "import sys, ctxkv_lib.views.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
