"""Figures as a notebook's page shows them: nothing covers a mark, nothing judges, nothing leaves the page."""

import re
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from sample_runs import sample_run

from ctxkv_lib.runs.published import PUBLISHED
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views import figures, markup, pictures, plots, sweeps
from ctxkv_lib.views.axes import QUIET


class Tags(HTMLParser):
    """The attributes of every tag, by its name."""

    def __init__(self, content):
        super().__init__()
        self.found = {}
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.found.setdefault(tag, []).append(dict(attrs))


@pytest.fixture
def curves(tmp_path):
    return figures.ppl_curves([load_run(sample_run(tmp_path / "run", 100)).summary])


def tags(figure):
    return Tags(markup.figure_html(figure, markup.png(figure))).found


SCORES = {
    "ppl": 300.0,
    "by_position": [{"from": 0, "to": 9, "ppl": 310.0}, {"from": 10, "to": None, "ppl": 296.0}],
    "by_history": [{"from": 1, "to": 1, "ppl": 700.0}, {"from": 2, "to": 32, "ppl": 290.0}],
}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.ppl_curves([PUBLISHED[100], PUBLISHED[500]], curves=figures.CURVES),
        lambda: figures.ppl_by_reading(SCORES),
        lambda: pictures.pass_curve([0.5, 0.2, 0.1, 0.01]),
        lambda: pictures.overfitting({"a run with a long name": PUBLISHED[500]["phase2"]["epochs"]}),
        lambda: sweeps.settings_summary({"base": [100.0], "near": [100.1], "far": [80.0]}, "base"),
    ],
    ids=["curves", "reading", "passes", "overfitting", "settings"],
)
def test_no_text_lies_on_a_curve_or_a_mark(draw):
    figure = draw()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [legend.get_window_extent(renderer) for legend in figure.legends]
    boxes += [text.get_window_extent(renderer) for ax in figure.axes for text in ax.texts]
    for ax in figure.axes:
        assert ax.get_legend() is None  # inside the axes, where curves are
        for line in ax.get_lines():
            path = line.get_path().transformed(line.get_transform())
            assert not any(path.intersects_bbox(box, filled=False) for box in boxes), line.get_label()


def test_the_ring_of_accuracy_is_not_said_to_be_a_ppl():
    figure = figures.ppl_curves([PUBLISHED[500]], ["published"], ["accuracy"])
    words = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert "epoch 5: 20.9% right" in words
    assert "175.7" not in words
    assert "its PPL" not in words


def test_one_seed_gives_no_setting_a_colour_and_seeds_only_beyond_their_spread():
    def colours(results):
        (ax,) = sweeps.settings_summary(results, "base").axes
        return [to_hex(line.get_color()).upper() for line in ax.get_lines() if line.get_marker() == "D"]

    assert set(colours({"base": [100.0], "other": [100.1], "far": [50.0]})) == {QUIET.upper()}
    several = {"base": [99.0, 101.0], "near": [100.0, 102.0], "low": [79.0, 81.0], "high": [110.0, 111.0]}
    assert colours(several) == [QUIET.upper(), QUIET.upper(), "#0072B2", "#D55E00"]


def test_a_run_on_a_cpu_has_no_rows_for_a_gpu(tmp_path):
    run = load_run(sample_run(tmp_path / "run", 100, gpu=False))
    ours, published = plots.memory_timeline(run).axes
    assert [bars.get_label() for bars in ours.containers] == ["CPU now"]
    assert [bars.get_label() for bars in published.containers] == ["CPU now", "GPU now"]


def test_a_figure_shrinks_with_the_page_and_keeps_its_place(curves):
    found = tags(curves)
    (image,), box = found["img"], found["div"][1]
    assert (image["width"], image["height"]) == ("960", "460")
    assert "width:100%;height:auto" in image["style"]
    assert "width:100%;max-width:960px" in box["style"]


def test_a_figure_has_words_for_those_who_do_not_see_it(curves):
    (image,) = tags(curves)["img"]
    for words in ("Perplexity by epoch", "Perplexity per token", "100 samples, epoch 3: PPL 366.4"):
        assert words in image["alt"]


def test_each_point_says_its_value_under_the_pointer(curves):
    places = {place["title"]: place["style"] for place in tags(curves)["span"]}
    assert len(places) == 12  # six epochs, training and validation
    assert "100 samples: validation, 3: 366.4" in places
    left = [
        float(re.search(r"left:(.+?)%", places[f"100 samples: validation, {n}: {ppl}"])[1])
        for n, ppl in ((1, "580.3"), (3, "366.4"), (6, "477.5"))
    ]
    assert 0 < left[0] < left[1] < left[2] < 80
    assert left[1] - left[0] == pytest.approx(0.4 * (left[2] - left[0]), abs=0.1)


def test_what_lies_off_the_page_does_not_make_it_longer():
    figure = pictures.spectrum({"after Phase 1": torch.tensor([0.6, 0.3, 0.1, 1e-9])})
    places = [re.search(r"top:(-?[\d.]+)%", span["style"])[1] for span in tags(figure)["span"]]
    assert len(places) == 3
    assert all(-2 <= float(place) <= 100 for place in places)


def test_a_dark_page_of_each_notebook_turns_what_we_show_dark():
    for content in (markup.themed("x"), markup.show_html("x").data):
        rule, _ = re.search(r"<style>(.+?)</style>(.+)", content).groups()
        for page in ('[data-jp-theme-light="false"]', 'html[theme="dark"]', "body.vscode-dark"):
            assert f"{page} .ctxkv" in rule
        assert '<div class="ctxkv">x' in content


def test_names_are_shown_as_they_are(tmp_path):
    name = 'a $x_1$ <b> & "c"'
    figure = figures.ppl_curves([load_run(sample_run(tmp_path / "run", 100)).summary], [name])
    found = tags(figure)
    assert "b" not in found
    assert found["img"][0]["alt"].count(name) == 1
    assert found["span"][0]["title"].startswith(name)
    shown = sweeps.settings_summary({"base": [1.0], name: [2.0]}, "base").axes[0].get_yticklabels()[1]
    assert shown.get_text() == r'a \$x_1\$ <b> & "c"'


def test_controls_of_the_explorers_are_named_and_stay_on_the_page(tmp_path):
    explorer = plots.explore_runs(sample_run(tmp_path / "run", 100))
    for slider in (explorer.epochs, explorer.epoch):
        assert slider.description
        assert slider.layout.max_width == "98%"
    for row in explorer.children[:2]:
        assert row.layout.flex_flow == "row wrap"
