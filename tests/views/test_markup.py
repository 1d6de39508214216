"""HTML in a notebook: text stays text, figures fit the page, points have values, dark pages stay dark."""

import re
from html.parser import HTMLParser

import pytest
import torch
from sample_runs import sample_run

from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views import figures, markup, pictures, study
from ctxkv_lib.views.explore import AttendedWindow

HOSTILE = """<script>alert('1')</script> <img onerror="alert(2)"> & $x$ $\\bad{ | a | `b` **c** [d](e)"""
WINDOW = AttendedWindow(
    position=2,
    start=0,
    pieces=[HOSTILE, "a\nb", HOSTILE],
    slots=torch.tensor([2, 0, -1]),
    weights=torch.tensor([[0.6, 0.3, 0.1]]),
    target=HOSTILE,
    guesses=[(HOSTILE, 0.5)],
)


class Page(HTMLParser):
    """A piece of HTML as a browser reads it: the attributes of every tag by its name, and the text."""

    def __init__(self, content):
        super().__init__()
        self.found, self.written = {}, ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.found.setdefault(tag, []).append(dict(attributes))

    def handle_data(self, text):
        self.written += text


@pytest.fixture
def curves(tmp_path):
    return figures.ppl_curves([load_run(sample_run(tmp_path / "run", 100)).summary])


def page(figure):
    return Page(markup.figure_html(figure, markup.png(figure))).found


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (markup.token_boundaries([HOSTILE, "a"]), HOSTILE),
        (markup.attended_text(WINDOW, [0.6, 0.3, 0.1]), HOSTILE),
        (markup.table([HOSTILE, "b"], [[HOSTILE, "1"]]), HOSTILE),
        (markup.guesses_line(WINDOW), repr(HOSTILE)),
    ],
    ids=["tokens", "window", "table", "guesses"],
)
def test_text_is_shown_as_text(content, shown):
    read = Page(content)
    assert {*read.found} <= {"div", "span", "table", "tr", "th", "td", "b"}
    assert {name for tags in read.found.values() for tag in tags for name in tag} <= {
        "style",
        "class",
        "title",
    }
    assert shown in read.written
    first = next(iter(read.found.values()))[0]
    assert "mathjax_ignore" in first["class"]


def test_names_are_shown_as_they_are(tmp_path):
    name = 'a $x_1$ <b> & "c"'
    found = page(figures.ppl_curves([load_run(sample_run(tmp_path / "run", 100)).summary], [name]))
    assert "b" not in found
    assert found["img"][0]["alt"].count(name) == 1
    assert found["span"][0]["title"].startswith(name)
    ax = study.settings_summary({"base": [1.0], name: [2.0]}, "base").axes[0]
    assert ax.get_yticklabels()[1].get_text() == name


def test_a_line_break_shows_as_a_mark_and_a_break():
    assert "a⏎\nb" in markup.attended_text(WINDOW, [0.6, 0.3, 0.1])


def test_words_of_a_table_are_whole_and_longer_text_breaks():
    content = markup.table(["accuracy"], [["6,324"], ["x" * 60]])
    broken = [cell for cell in content.split("<t") if "overflow-wrap:anywhere" in cell]
    assert len(broken) == 1
    assert "x" * 60 in broken[0]


def test_a_figure_shrinks_with_the_page_and_keeps_its_place(curves):
    found = page(curves)
    (image,), box = found["img"], found["div"][1]
    assert (image["width"], image["height"]) == ("960", "460")
    assert "width:100%;height:auto" in image["style"]
    assert "width:100%;max-width:960px" in box["style"]


def test_a_figure_has_alt_text(curves):
    (image,) = page(curves)["img"]
    for words in ("Perplexity by epoch", "Perplexity per token", "100 samples, epoch 3: PPL 366.4"):
        assert words in image["alt"]


def test_each_point_shows_its_value_under_the_pointer(curves):
    places = {place["title"]: place["style"] for place in page(curves)["span"]}
    assert len(places) == 12  # six epochs, training and validation
    left = [
        float(re.search(r"left:(.+?)%", places[f"100 samples: validation, {n}: {ppl}"])[1])
        for n, ppl in ((1, "580.3"), (3, "366.4"), (6, "477.5"))
    ]
    assert 0 < left[0] < left[1] < left[2] < 80
    assert left[1] - left[0] == pytest.approx(0.4 * (left[2] - left[0]), abs=0.1)


def test_a_point_beyond_the_axes_does_not_make_the_page_longer():
    figure = pictures.spectrum({"after Phase 1": torch.tensor([0.6, 0.3, 0.1, 1e-9])})
    places = [re.search(r"top:(-?[\d.]+)%", span["style"])[1] for span in page(figure)["span"]]
    assert len(places) == 3
    assert all(-2 <= float(place) <= 100 for place in places)


def test_the_dark_page_of_each_notebook_turns_content_dark():
    for content in (markup.themed("x"), markup.show_html("x").data):
        rule, _ = re.search(r"<style>(.+?)</style>(.+)", content, re.DOTALL).groups()
        for dark in ('[data-jp-theme-light="false"]', 'html[theme="dark"]', "body.vscode-dark"):
            assert f"{dark} .ctxkv" in rule
        assert '<div class="ctxkv">x' in content
