"""Text from conversations, files and names is shown as it is: never markup, script or mathematics."""

import re
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sample_runs import phase1_lines, sample_run

from ctxkv_lib.files import read_json, write_json
from ctxkv_lib.report import write_report
from ctxkv_lib.report.model_card import model_card
from ctxkv_lib.report.tables import literal
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views import figures, markup, pictures, sweeps
from ctxkv_lib.views.explore import Window

HOSTILE = """<script>alert('1')</script> <img onerror="alert(2)"> & $x$ $\\bad{ | a | `b` **c** [d](e)"""


class Reader(HTMLParser):
    """Tags, attributes and text of a piece of HTML, as a browser reads them."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.names, self.written, self.classes = set(), set(), "", []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.names |= {name for name, _ in attributes}
        self.classes.append(dict(attributes).get("class"))

    def handle_data(self, text):
        self.written += text


WINDOW = Window(
    position=2,
    start=0,
    pieces=[HOSTILE, "a\nb", HOSTILE],
    slots=torch.tensor([2, 0]),
    weights=torch.tensor([[0.7, 0.3]]),
    target=HOSTILE,
    guesses=[(HOSTILE, 0.5)],
)


@pytest.mark.parametrize(
    "content",
    [
        markup.token_boundaries([HOSTILE, "a"]),
        markup.attended_text(WINDOW, [0.7, 0.3]),
        markup.table([HOSTILE, "b"], [[HOSTILE, "1"]]),
    ],
    ids=["tokens", "window", "table"],
)
def test_widgets_show_text_as_text(content):
    read = Reader(content)
    assert read.tags <= {"div", "span", "table", "tr", "th", "td", "b"}
    assert read.names <= {"style", "class", "title"}
    assert HOSTILE in read.written
    assert "mathjax_ignore" in read.classes[0]


def test_guesses_show_text_as_text():
    read = Reader(markup.guesses_line(WINDOW))
    assert read.tags == {"div", "b"}
    assert read.written.count(repr(HOSTILE)) == 2


def outside_text_in(folder):
    """A finished run whose every text from outside is hostile."""
    settings = {"data.source": "jsonl", "data.path": HOSTILE}
    sample_run(folder, preset="ci", settings=settings)
    summary = read_json(folder / "summary.json")
    summary["provenance"]["device"] = HOSTILE
    summary["provenance"]["versions"] = {"torch": HOSTILE}
    summary["phase1"]["contexts"] = "exact"
    write_json(folder / "summary.json", summary)
    return load_run(folder)


def test_reports_and_cards_hold_no_markup_of_others(tmp_path):
    run = outside_text_in(tmp_path / "run")
    for text in (write_report([run], "en"), write_report([run], "ja"), model_card(run)):
        assert "<script" not in text
        assert "<img" not in text
        assert literal(HOSTILE) in text
        for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
            columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(columns) == 1, table


def test_literal_text_has_no_live_markdown():
    assert literal("a | b\n`c` <d> $e$") == r"a \| b \`c\` &lt;d&gt; \$e\$"
    assert literal("2026-01-31, cpu (x86, 2 threads)") == "2026-01-31, cpu (x86, 2 threads)"


@pytest.mark.parametrize("name", ["costs $5 and $6", r"$\bad{", r"a \$ b", "$x"])
def test_figures_show_dollar_signs(tmp_path, name):
    (summary,) = [load_run(sample_run(tmp_path / "run")).summary]
    epochs, values = summary["phase2"]["epochs"], torch.rand(12, 4)
    made = [
        figures.ppl_curves([summary], [name]),
        figures.phase1_curves({name: phase1_lines()}),
        figures.memory_by_stage([summary], [name]),
        sweeps.settings_summary({name: [2.0], "b": [3.0]}, name),
        pictures.overfitting({name: epochs}),
        pictures.cache_sizes({name: {"train": 1.0}}),
        pictures.context_clouds({name: values}),
        pictures.spectrum({name: values[0] / values[0].sum()}),
        pictures.token_lengths(torch.arange(9), name),
    ]
    for figure in made:
        FigureCanvasAgg(figure).draw()  # mathematics that cannot be read raises here
