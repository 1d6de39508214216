"""The notebooks' figures, through what they draw."""

import pytest
import torch
from drawn import line
from matplotlib.colors import to_hex

from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.windows import slot_offsets
from ctxkv_lib.runs.published import PUBLISHED
from ctxkv_lib.views import explore, pictures, sweeps
from ctxkv_lib.views.axes import QUIET


def test_token_lengths_count_every_conversation():
    figure = pictures.token_lengths(torch.tensor([10, 20, 20, 400]))
    (ax,) = figure.axes
    assert sum(bar.get_height() for bar in ax.patches) == 4
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {
        "median: 20 tokens",
        "mean: 112 tokens",
    }


def test_lengths_that_are_all_alike_stand_at_one_number():
    (ax,) = pictures.token_lengths(torch.tensor([25, 25, 25])).axes
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [25]


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
    weights = torch.rand(3, 32)
    figure = pictures.attention_by_distance(weights, ModelConfig(slots="geometric"))
    above, below = figure.axes[:2]
    for ax in (above, below):
        named = dict(zip(ax.get_xticks(), (tick.get_text() for tick in ax.get_xticklabels()), strict=True))
        assert named[0] == "0"
        assert named[30] == str(slot_offsets(ModelConfig(slots="geometric"))[30])
    assert above.images[0].get_array().tolist() == (100 * weights).tolist()
    assert [bar.get_height() for bar in below.patches] == pytest.approx((100 * weights.mean(0)).tolist())


def test_overfitting_is_the_ratio_of_the_ppls():
    (ax,) = pictures.overfitting({"published": PUBLISHED[500]["phase2"]["epochs"]}).axes
    ratios = list(line(ax, "published").get_ydata())
    assert len(ratios) == 7  # the eighth epoch was not published
    assert ratios[4] == pytest.approx(175.7 / 78.4)


def test_settings_are_compared_with_the_base():
    results = {"base": [100.0, 110.0], "better": [84.0], "worse": [126.0]}
    (ax,) = sweeps.settings_summary(results, "base").axes
    notes = [text.get_text() for text in ax.texts]
    assert notes == ["105.0", "84.0  (-20.0%)", "126.0  (+20.0%)"]
    assert to_hex(line(ax, "better").get_color()) == to_hex(line(ax, "worse").get_color()) == QUIET
    assert list(line(ax, "base: spread").get_xdata()) == [100, 110]


def test_cache_sizes_and_passes_show_their_numbers():
    (ax,) = pictures.cache_sizes({"here": {"total": 2.0}, "seed": {"total": 8.0}}).axes
    assert [bar.get_width() for bar in ax.patches] == [2.0, 8.0]
    (ax,) = pictures.pass_curve([0.5, 0.2, 0.1, 0.01]).axes
    assert line(ax, "published passes (3): 0.1").get_xydata().tolist() == [[3, 0.1]]


def test_every_axis_of_every_figure_has_a_name(trained):
    window = explore.attended_window(trained, "val", 30)
    drawn = [
        pictures.token_lengths(torch.tensor([10, 20])),
        pictures.window_map(ModelConfig(), [50]),
        pictures.context_clouds({"a": torch.randn(9, 3)}),
        pictures.spectrum({"a": torch.full((4,), 0.25)}),
        pictures.pass_curve([0.5, 0.1]),
        pictures.cache_sizes({"here": {"total": 2.0}}),
        pictures.attention_by_distance(torch.rand(2, 4), ModelConfig()),
        pictures.window_attention(window, window.weights.mean(dim=0)),
        pictures.overfitting({"a": PUBLISHED[100]["phase2"]["epochs"]}),
        sweeps.settings_summary({"base": [1.0]}, "base"),
    ]
    for figure in drawn:
        assert figure.get_facecolor() == (1, 1, 1, 1)
        for ax in figure.axes:
            assert ax.get_xlabel() or ax.get_label() == "<colorbar>"
            assert ax.get_ylabel() or any(tick.get_text() for tick in ax.get_yticklabels())
