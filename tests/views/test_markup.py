"""HTML in a notebook: text stays text, figures fit the page, points have values, dark pages stay dark."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from drawn import HOSTILE
from matplotlib.colors import to_rgb
from sample_runs import sample_run

from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.runs.published import PUBLISHED
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views import axes, figures, markup, pictures
from ctxkv_lib.views.explore import AttendedWindow

WINDOW = AttendedWindow(
    position=2,
    pieces=dict(enumerate([HOSTILE, "a\nb", HOSTILE])),
    slots=torch.tensor([2, 0, -1]),
    weights=torch.tensor([[0.6, 0.3, 0.1]]),
    target=HOSTILE,
    is_right=True,
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
        (markup.attended_text(WINDOW, {2: 0.6}), HOSTILE),
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


def test_no_text_shows_a_backslash_for_a_line_break():
    """In the text an arrow stands where a colour needs something to be seen on, and nowhere else."""
    window = replace(WINDOW, pieces=dict(enumerate("a\nb")), target="\n", guesses=[("\n", 0.5)])
    assert Page(markup.attended_text(window, {2: 0.6, 0: 0.3})).written == "a\nb↵\n"
    assert Page(markup.attended_text(window, {2: 0.6, 1: 0.3})).written == "a↵\nb↵\n"
    assert "'↵' 50.0%" in Page(markup.guesses_line(window)).written
    assert Page(markup.token_boundaries(["a", "\n"])).written == "a↵\n"


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def on_a_dark_page(rgb):
    """`invert(0.93) hue-rotate(180deg)`."""
    inverted = [0.93 - 0.86 * c for c in rgb]
    grey = sum(weight * c for weight, c in zip((0.213, 0.715, 0.072), inverted, strict=True))
    return [min(max(2 * grey - c, 0), 1) for c in inverted]


@pytest.mark.parametrize("page", [list, on_a_dark_page])
@pytest.mark.parametrize("share", [0.06, 0.2, 0.34, 0.4, 0.5, 0.6])
def test_an_attended_token_can_be_read_however_much_it_is_attended(share, page):
    """By WCAG AA: a contrast of 4.5 to 1."""
    spans = Page(markup.attended_text(WINDOW, {1: share, 2: 0.6})).found["span"]
    blue, ink = re.fullmatch(r"background:rgba\((.+)\);color:(.+)", spans[1]["style"]).groups()
    *rgb, alpha = map(float, blue.split(","))
    ground = page([1 - alpha * (1 - c / 255) for c in rgb])
    contrast = sorted(0.05 + luminance(colour) for colour in (ground, page(to_rgb(ink))))
    assert contrast[1] / contrast[0] >= 4.5


def test_a_box_of_text_cuts_no_line():
    """It is a whole number of lines high, and has no padding that lines scroll into."""
    rules = "".join(re.findall(r"\.ctxkv \.text \{(.+?)\}", markup.STYLE, re.DOTALL))
    line, most = (int(re.search(rf"{name}: (\d+)px", rules)[1]) for name in ("line-height", "max-height"))
    assert most % line == 0
    assert "padding" not in rules


def test_a_download_looks_like_a_link():
    (link,) = Page(markup.download_link("curves.csv", b"1", "text/csv")).found["a"]
    assert "text-decoration:underline" in link["style"]
    assert link["download"] == "curves.csv"


def test_words_of_a_table_are_whole_and_longer_text_breaks():
    content = markup.table(["accuracy"], [["6,324"], [""], ["x" * 60]])
    broken = [cell for cell in content.split("<t") if "overflow-wrap:anywhere" in cell]
    assert len(broken) == 1
    assert "x" * 60 in broken[0]


def test_a_figure_shrinks_with_the_page_and_has_alt_text_and_values_under_the_pointer(curves):
    found = page(curves)
    (image,), box = found["img"], found["div"][1]
    assert (image["width"], image["height"]) == ("960", "460")
    assert "width:100%;height:auto" in image["style"]
    assert "width:100%;max-width:960px" in box["style"]
    assert image["alt"] == (
        "Perplexity by epoch; Perplexity per token (log scale) by Epoch (passes over the training tokens); "
        "100 samples, epoch 3: PPL 366.4; train; validation; best epoch: lowest, validation PPL; early stop; "
        "first train PPL, above the axis."
    )
    described = markup.alt_text(pictures.window_map(ModelConfig(), [50]))
    assert "; Distance back from the position (tokens); 3 contexts, from position 50 back" in described
    places = {place["title"]: place["style"] for place in found["span"]}
    assert len(places) == 12  # six epochs, training and validation
    left = [
        float(re.search(r"left:(.+?)%", places[f"100 samples: validation, epoch {n}: {ppl}"])[1])
        for n, ppl in ((1, "580.3"), (3, "366.4"), (6, "477.5"))
    ]
    assert 0 < left[0] < left[1] < left[2] < 80
    assert left[1] - left[0] == pytest.approx(0.4 * (left[2] - left[0]), abs=0.1)
    assert "100 samples: train, epoch 1: 2,905" in places  # above the axis


def test_values_under_the_pointer_are_rounded_and_have_a_unit():
    accuracy = figures.ppl_curves([PUBLISHED[500]], ["published"], ["accuracy"])
    assert page(accuracy)["span"][4]["title"] == "published: accuracy, epoch 5: 20.9%"
    rate = figures.phase1_curves(
        {"this run": [{"iteration": 2, "loss": 5.4321, "convergence_rate": 0.60883}]}, 1
    )
    titles = [span["title"] for span in page(rate)["span"]]
    assert titles == ["this run, iteration 2: 60.88%", "this run, iteration 2: 5.432"]


def test_only_what_has_a_name_and_a_value_is_shown_under_the_pointer():
    """A loss that is no number has no value."""
    losses = (5.0, float("nan"), float("inf"))
    lines = [{"iteration": n, "loss": loss, "convergence_rate": 0.5} for n, loss in enumerate(losses)]
    titles = [span["title"] for span in page(figures.phase1_curves({"a": lines}, 1))["span"]]
    assert titles == [*(f"a, iteration {n}: 50%" for n in range(3)), "a, iteration 0: 5"]


def test_a_point_beyond_the_axes_is_shown_at_their_end():
    figure, (ax,) = axes.panels(1, 3)
    ax.plot([1, 2, 3, 4], [6, 3, 1, 900], label="measured")
    ax.set_ylim(0, 10)
    places = [re.search(r"bottom:(-?[\d.]+)%", span["style"])[1] for span in page(figure)["span"]]
    assert len(places) == 4
    assert all(-2 <= float(place) <= 100 for place in places)


def test_the_dark_page_of_each_notebook_turns_content_dark():
    for content in (markup.themed("x"), markup.show_html("x").data):
        rule, _ = re.search(r"<style>(.+?)</style>(.+)", content, re.DOTALL).groups()
        for dark in ('[data-jp-theme-light="false"]', 'html[theme="dark"]', "body.vscode-dark"):
            assert f"{dark} .ctxkv" in rule
        assert '<div class="ctxkv">x' in content
