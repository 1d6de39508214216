"""Figures, through what they draw rather than through pixels."""

import re

import pytest
import torch
from drawn import labels, legend, line
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from sample_runs import EPOCHS, phase1_lines, runs

from ctxkv_lib.errors import UserError
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.runs.published import PUBLISHED, PUBLISHED_PHASE1
from ctxkv_lib.views import explore, figures, pictures
from ctxkv_lib.views.axes import INK, OKABE_ITO, QUIET, log_y, panels, save
from ctxkv_lib.views.markup import png

SCORES = {
    "ppl": 300.0,
    "by_position": [{"from": 0, "to": 9, "ppl": 310.0}, {"from": 10, "to": None, "ppl": 296.0}],
    "by_history": [{"from": 1, "to": 1, "ppl": 700.0}, {"from": 2, "to": 32, "ppl": 290.0}],
}


def summaries(tmp_path, *samples, **options):
    return [run.summary for run in runs(tmp_path, *samples, **options)]


# Curves of runs


def test_ppl_curves_draw_each_epoch_and_mark_the_best_and_the_stop(tmp_path):
    figure = figures.ppl_curves(iter(summaries(tmp_path, 100, 500)))
    (ax,) = figure.axes
    assert ax.get_yscale() == "log"
    for samples, rows in EPOCHS.items():
        name = f"{samples} samples"
        assert list(line(ax, f"{name}: train").get_ydata()) == [row[0] for row in rows]
        assert list(line(ax, f"{name}: validation").get_xdata()) == [1, 2, 3, 4, 5, 6]
        assert line(ax, f"{name}: train").get_linestyle() == "--"
        assert line(ax, f"{name}: best epoch").get_xydata().tolist() == [[3, rows[2][1]]]
        assert line(ax, f"{name}: early stop").get_xydata().tolist() == [[6, rows[5][1]]]
    named = {"100 samples\nepoch 3: PPL 366.4", "500 samples\nepoch 3: PPL 179.2"}
    assert {*named, "train", "validation", "early stop"} <= set(legend(figure))
    few = {"settings": {"phase2.max_epochs": 3}, "epochs": EPOCHS[500][:3]}
    figure = figures.ppl_curves(summaries(tmp_path / "few", 500, **few))
    assert not [drawn for drawn in figure.axes[0].get_lines() if "early stop" in drawn.get_label()]
    assert "early stop" not in legend(figure)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": ["one"]}, "summaries has 2 and labels 1"),  # it would be drawn without the other
        ({"summaries": []}, "summaries has 0"),
        ({"curves": ["val"]}, r"curves is \['val'\]; allowed: at least one of train, validation, accuracy"),
        ({"curves": "validation"}, "curves is 'validation'; allowed"),
        ({"curves": []}, "curves is .*; allowed"),
    ],
)
def test_curves_that_do_not_exist_and_runs_without_a_label_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        figures.ppl_curves(**{"summaries": [PUBLISHED[100], PUBLISHED[500]], **options})


def test_a_style_of_the_user_changes_no_colour_and_no_size(tmp_path):
    (summary,) = summaries(tmp_path, 100)
    plain = png(figures.ppl_curves([summary]))
    own = {"savefig.bbox": "tight", "text.usetex": True}
    with style.context(["dark_background", own]):
        assert png(figures.ppl_curves([summary])) == plain
        assert save(figures.ppl_curves([summary]), tmp_path / "a.png").read_bytes()[:24] == plain[:24]


def test_six_runs_have_six_colours(tmp_path):
    (ax,) = figures.ppl_curves(summaries(tmp_path, *range(501, 507))).axes
    assert len({drawn.get_color() for drawn in ax.get_lines()}) == len({*map(to_rgb, OKABE_ITO)}) == 6


@pytest.mark.parametrize("name", ["a", "a long name of a run, which is broken into lines to fit"])
def test_the_legend_of_many_runs_is_not_cut_off(tmp_path, name):
    many = summaries(tmp_path, 100) * 12
    figure = figures.ppl_curves(many, [f"{name} {place}" for place in range(12)])
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    assert figure.legends[0].get_window_extent(renderer).y0 > 0


@pytest.mark.parametrize("log", [True, False])
def test_the_first_train_ppl_has_a_mark_and_does_not_stretch_the_axis(tmp_path, log):
    """Also when the first epoch is the only one so far, as in the live view."""
    (summary,) = summaries(tmp_path, 100)
    begun = {**summary, "phase2": {**summary["phase2"], "epochs": summary["phase2"]["epochs"][:1]}}
    for shown, least in ((summary, 61.1), (begun, 580.3)):
        figure = figures.ppl_curves([shown], ["a run"], log=log)
        (ax,) = figure.axes
        assert line(ax, "a run: train").get_marker() == "o"
        assert ax.get_ylim() == pytest.approx((0.9 * least, 1.5 * 580.3))  # not 2,905.2
        assert ax.yaxis.get_major_formatter()(3000) == "3,000"
        assert line(ax, "a run: above the axis").get_marker() == "^"
        assert "first train PPL\nabove the axis" in legend(figure)
    for epochs in ((6, 6), (7, 9)):
        figure = figures.ppl_curves([summary], ["a run"], ["train"], log, epochs)
        assert labels(figure.axes[0]) == ["a run: train"]
        assert legend(figure) == ["a run", " ", "train"]


def test_published_runs_are_drawn_without_their_missing_epoch():
    (ax,) = figures.ppl_curves([PUBLISHED[500]], ["published"], ["validation", "train"]).axes
    assert line(ax, "published: best epoch").get_xdata() == [5]
    assert list(line(ax, "published: validation").get_xdata()) == [1, 2, 3, 4, 5, 6, 7]
    assert not [drawn for drawn in ax.get_lines() if "early stop" in drawn.get_label()]
    (ax,) = figures.overfitting({"published": PUBLISHED[500]["phase2"]["epochs"]}).axes
    ratios = list(line(ax, "published").get_ydata())
    assert len(ratios) == 7
    assert ratios[4] == pytest.approx(175.7 / 78.4)
    # The best epoch of the accuracy panel is not called its best.
    words = " ".join(legend(figures.ppl_curves([PUBLISHED[500]], ["published"], ["accuracy"])))
    assert "epoch 5: 20.9% right" in words
    assert "best epoch: lowest\nvalidation PPL" in words
    assert "175.7" not in words


def test_phase1_curves_show_percent_the_stop_line_and_the_loss_without_missing_values():
    lines = phase1_lines()
    (strict, _) = figures.phase1_curves({"500 samples": lines}, stop_rate=0.995).axes
    assert set(line(strict, "stop at 99.5%").get_ydata()) == {99.5}
    rate, loss = figures.phase1_curves({"500 samples": lines}, stop_rate=0.8).axes
    assert list(line(rate, "500 samples").get_xdata()) == list(range(2, 18))
    assert line(rate, "500 samples").get_ydata()[-1] == pytest.approx(93)
    assert set(line(rate, "stop at 80%").get_ydata()) == {80}
    assert list(line(loss, "500 samples").get_ydata()) == [each["loss"] for each in lines]
    assert loss.get_yscale() == "log"
    published = [*PUBLISHED_PHASE1[500], {"stage": "phase1", "iteration": 19, "loss": -0.1}]
    rate, loss = figures.phase1_curves({"published": published}, stop_rate=0.9).axes
    assert list(line(rate, "published").get_xdata()) == [7, 12, 15, 18]
    assert loss.get_yscale() == "linear"
    assert png(figures.phase1_curves({"without Phase 1": []}, stop_rate=0.9))


def test_memory_shows_first_and_last_epoch_and_the_peak(tmp_path):
    figure = figures.memory_by_stage(summaries(tmp_path, 100, 500))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["100 samples", "500 samples"]
    ax = figure.axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[-2:] == ["first epoch", "last epoch"]
    assert len(names) == 6
    assert [bar.get_width() for bar in ax.containers[0]][:2] == [1.3, 1.9]
    assert list(line(ax, "GPU peak").get_xdata()) == pytest.approx([0.8, 1.1, 1.2, 1.3, 1.4, 1.4])
    # Stages are named at the left of both rows, and a GPU that was not used is not drawn.
    figure = figures.memory_by_stage(summaries(tmp_path, 100, 200, 300, 400, gpu=False))
    assert [bool(ax.get_ylabel()) for ax in figure.axes] == [True, False, True, False]
    assert [bool(ax.get_yticklabels()) for ax in figure.axes] == [True, False, True, False]
    assert not [text for text in legend(figure) if "GPU" in text]
    assert len(figure.axes[0].containers) == 1


# Figures of the method


def test_token_lengths_count_every_conversation():
    figure = pictures.token_lengths(torch.tensor([10, 20, 20, 400]))
    (ax,) = figure.axes
    assert sum(bar.get_height() for bar in ax.patches) == 4
    assert {"median: 20 tokens", "mean: 112 tokens"} <= set(legend(figure))
    (ax,) = pictures.token_lengths(torch.tensor([25] * 91)).axes
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(24.5, 1)]
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [25]


def test_window_map_has_the_published_counts():
    (ax,) = pictures.window_map(ModelConfig(), [50, 350, 3500]).axes
    for position, real in ((50, 3), (350, 18), (3500, 32)):
        assert len(line(ax, f"{position}: contexts").get_xdata()) == real
        assert len(line(ax, f"{position}: before the stream").get_xdata()) == 32 - real
    assert list(line(ax, "50: contexts").get_xdata()) == [0, 20, 40]
    assert ax.texts[0].get_text() == "3 contexts, from position 50 back to 10"
    (ax,) = pictures.window_map(ModelConfig(), [50], [0, 4, 36]).axes
    assert list(line(ax, "50: contexts").get_xdata()) == [0, 4, 36]


def test_clouds_mark_the_centroid():
    points = torch.randn(50, 6) + 3
    for ax in pictures.context_clouds({"a": 2 * points, "b": points.half()}).axes:
        assert max(line(ax, "contexts").get_xdata()) < ax.get_xlim()[1]
        (x,), _ = line(ax, "centroid").get_data()
        assert x > 5  # the strongest direction is that of the mean, which has length 3 * sqrt(6)


OFFSETS = [slot**2 for slot in range(32)]


def test_heatmap_and_mean_show_the_same_attention():
    weights = torch.rand(3, 32)
    above, below, _ = pictures.attention_by_distance(weights, OFFSETS).axes
    for ax in (above, below):
        named = dict(zip(ax.get_xticks(), (tick.get_text() for tick in ax.get_xticklabels()), strict=True))
        assert named[0] == "0"
        assert named[30] == str(OFFSETS[30])
    assert above.images[0].get_array().tolist() == (100 * weights).tolist()
    assert list(above.images[0].get_extent()) == [-0.5, 31.5, 3.5, 0.5]  # heads are numbered from 1
    assert [bar.get_height() for bar in below.patches] == pytest.approx((100 * weights.mean(0)).tolist())


def test_attention_to_no_slot_is_named(trained):
    window = explore.attended_window(trained, "val", 30)
    whole, half = (
        legend(pictures.window_attention(window, share * window.weights[0], "head 1")) for share in (1, 0.5)
    )
    assert "to no slot, as a sink takes it: 50.0%" in half
    assert not [label for label in whole if "no slot" in label]


def test_spectrum_sizes_and_passes_show_their_numbers():
    (ax,) = pictures.spectrum({"even": explore.singular_values(torch.eye(8).half())}).axes
    even, alike = ax.get_lines()
    assert even.get_label() == "even: effective rank 8 of 8 (100%)"
    assert (len(even.get_xdata()), alike.get_ydata()[0]) == (7, 12.5)
    (ax,) = pictures.cache_sizes({"here": {"total": 2.0}, "published": {"total": 8.0}}).axes
    assert [bar.get_width() for bar in ax.patches] == [2.0, 8.0]
    for errors in ([0.5, 0.2, 0.1, 0.01], [0.5, 0.2, 0.1]):
        (ax,) = pictures.pass_curve(errors).axes
        assert line(ax, "published passes (3): 0.1").get_xydata().tolist() == [[3, 0.1]]


@pytest.mark.parametrize(("last", "most"), [(0.02, 6), (1e-9, 12)])
def test_errors_over_any_range_have_few_plain_ticks(last, most):
    figure = pictures.pass_curve([0.7, last])
    figure.draw_without_rendering()
    (ax,) = figure.axes
    low, high = ax.get_ylim()
    ticks = [*ax.yaxis.get_major_ticks(), *ax.yaxis.get_minor_ticks()]
    shown = [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high]
    assert 2 < len([text for text in shown if text]) < most
    assert not [text for text in shown if "$" in text]


@pytest.mark.parametrize("ends", [(898, 1337), (1000, 1040), (95, 105), (110, 230), (120, 2000)])
def test_a_log_axis_of_any_range_has_ticks(ends):
    figure, (ax,) = panels(1, 4)
    ax.plot(ends)
    log_y(ax, "")
    figure.draw_without_rendering()
    low, high = ax.get_ylim()
    assert sum(low <= label.get_position()[1] <= high for label in ax.get_yticklabels()) >= 3


# Figures of settings


def test_settings_are_compared_with_the_base_and_coloured_only_beyond_the_noise_of_seeds():
    results = {"base": [100.0, 110.0, 105.0], "better": [84.0], "worse": [126.0], "alike": [105.01]}
    (ax,) = figures.settings_summary(results, "base").axes
    notes = ["105.0", "84.0  (-20.0%)", "126.0  (+20.0%)", "105.0  (the same)"]
    assert [text.get_text() for text in ax.texts] == notes
    assert [100, 110] in [list(drawn.get_xdata()) for drawn in ax.get_lines()]

    def colours(results):
        (ax,) = figures.settings_summary(results, "base").axes
        return [to_hex(line.get_color()).upper() for line in ax.get_lines() if line.get_marker() == "D"]

    for single in (results, {"base": [100.0], "other": [100.1], "far": [50.0, 51.0]}):
        assert set(colours(single)) == {QUIET.upper()}
    noise = {"base": [99.0, 101.0], "near": [101.4, 101.6], "wide": [90.0, 99.0]}
    several = {**noise, "low": [79.0, 81.0], "high": [110.0, 111.0]}
    assert colours(several) == [*[QUIET.upper()] * 3, "#0072B2", "#D55E00"]
    texts = figures.settings_summary(several, "base").axes[0].texts  # say the same without a colour
    assert [text.get_weight() for text in texts] == [*["normal"] * 3, "bold", "bold"]
    assert {text.get_color() for text in texts} == {INK}


REMEMBERED = [{"distance": n, "r2": r2, "top1": 0.1} for n, r2 in enumerate((0.12, 0.05, 0.008, -0.3))]


# All of them


def drawn_with(name):
    """Each figure, with `name` wherever it shows a name; and what it needs for that."""
    summary, values = PUBLISHED[500], torch.rand(12, 4)
    return [
        figures.ppl_curves([summary, PUBLISHED[100]], [name, "other"], curves=list(figures.CURVES)),
        figures.phase1_curves({name: phase1_lines()}, stop_rate=0.9),
        figures.memory_by_stage([summary], [name]),
        figures.overfitting({name: summary["phase2"]["epochs"]}),
        figures.ppl_by_reading(SCORES),
        figures.settings_summary({name: [2.0], "near": [2.01], "far": [1.0]}, name),
        pictures.cache_sizes({name: {"train": 1.0}}),
        pictures.context_clouds({name: values}),
        pictures.spectrum({name: values[0] / values[0].sum()}),
        pictures.token_lengths(torch.arange(9)),
        pictures.window_map(ModelConfig(), [50]),
        pictures.pass_curve([0.5, 0.2, 0.1, 0.01]),
        pictures.attention_by_distance(torch.rand(2, 4), [0, 20, 40, 60]),
    ]


def test_figures_can_be_read_whatever_names_they_show_and_on_a_small_page(trained):
    """Every axis has a name, no text lies on a curve or a mark, and dollar signs begin no mathematics."""
    window = explore.attended_window(trained, "val", 30)
    attention = pictures.window_attention(window, window.weights[1], "head 2")
    for figure in [*drawn_with(r"costs $5 and $\bad{, a \$ b, $x"), attention]:
        assert figure.get_facecolor() == (1, 1, 1, 1)
        on_a_small_page = 620 / figure.get_size_inches()[0] / 72  # pixels of a point, 620 pixels wide
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        boxes = [shown.get_window_extent(renderer) for shown in figure.legends]
        boxes += [text.get_window_extent(renderer) for ax in figure.axes for text in ax.texts]
        for ax in figure.axes:
            assert ax.get_xlabel() or ax.get_label() == "<colorbar>"
            assert ax.get_ylabel() or not ax.get_yticklabels() or ax.get_yticklabels()[0].get_text()
            assert ax.get_legend() is None  # inside the axes, where curves are
            for label in (ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()):
                assert label.get_size() * on_a_small_page > 9.8
            for drawn in ax.get_lines():
                path = drawn.get_path().transformed(drawn.get_transform())
                over = [box for box in boxes if box.overlaps(ax.bbox)]  # what leaves the axes is cut off
                assert not any(path.intersects_bbox(box, filled=False) for box in over), drawn.get_label()


def test_memory_of_contexts_is_in_one_unit_and_says_none_only_below_its_threshold():
    """R² is a share on the axis, in the legend and in reports; grey is what lies beyond the memory span."""
    common = {"coverage": 2 / 3, "offsets": [0, 20]}
    weak = {**common, "decodability": REMEMBERED, "memory_span": 1}
    none = {**common, "decodability": REMEMBERED[2:], "memory_span": None}
    model = ModelConfig(max_contexts=2)
    figure = pictures.memory_of_contexts({**weak, "untrained": {"0.01": none}}, model, slots=2)
    assert {ax.get_ylabel() for ax in figure.axes} == {"Decodability of the token (R²)"}
    trained, untrained = figure.axes[1].get_lines()
    assert trained.get_xydata().tolist() == [[1, 0.12], [2, 0.05], [3, 0.008], [4, 0]]
    (zero,) = figure.axes[1].get_xticklabels()
    assert (zero.get_position()[0], zero.get_text()) == (1, "0")
    assert trained.get_label() == "this run: memory span 1 token"
    assert untrained.get_label() == "random weights 0.01: no memory span"
    window = figure.axes[0]
    assert window.get_title(loc="left").startswith("67% of the window")
    assert "beyond each slot's memory span (R² ≤ 0.01)" in legend(figure)
    assert not [text for text in legend(figure) if "%" in text]
    near = {**weak, "untrained": {}, "offsets": [0, 1]}
    window, _ = pictures.memory_of_contexts(near, ModelConfig(interval=1, max_contexts=2), slots=2).axes
    assert all(tick == round(tick) for tick in window.get_xticks())


@pytest.mark.parametrize(
    ("offsets", "slots", "shown", "span"),
    [([0, 20], 2, [0, 20], 1), ([0, 20], 1, [0], None), ([0, 4, 36], 1, [0, 4, 36], 1)],
)
def test_a_token_is_decoded_from_the_nearest_slot_that_has_read_it(offsets, slots, shown, span):
    found = {"decodability": REMEMBERED, "memory_span": span, "coverage": 1, "untrained": {}}
    model = ModelConfig(max_contexts=2)
    window, _ = pictures.memory_of_contexts({**found, "offsets": offsets}, model, slots).axes
    held, beyond = window.collections
    assert line(window, "slot").get_xdata().tolist() == shown
    assert window.get_xscale() == ("linear" if offsets == [0, 20] else "symlog")
    heights = {tuple(point) for point in held.get_paths()[0].vertices.tolist()}
    assert {(slot + back, r2) for slot in shown for back, r2 in enumerate((0.12, 0.05))} <= heights
    assert beyond.get_paths()[0].vertices[:, 0].min() == (2 if span else 0)


def test_bars_are_named_by_their_bins():
    for ax, names in zip(figures.ppl_by_reading(SCORES).axes, (["0–9", "10+"], ["1", "2–32"]), strict=True):
        assert [tick.get_text() for tick in ax.get_xticklabels()] == names


def test_ticks_have_thousands_separators():
    figure, (plain, log) = panels(2, 4)
    for ax in (plain, log):
        ax.plot([0, 5000], [900, 12_000])
    log_y(log, "logarithmic")
    figure.draw_without_rendering()
    for axis in (plain.xaxis, plain.yaxis, log.yaxis):
        assert "5,000" in [label.get_text() for label in axis.get_ticklabels()] or axis is plain.yaxis
        assert not [label for label in axis.get_ticklabels() if re.search(r"\d{4}", label.get_text())]
    assert "10,000" in [label.get_text() for label in plain.yaxis.get_ticklabels()]
