"""The tables on the study's pages and in the README agree with its results."""

import re

import figures
import matplotlib.pyplot as plt
import pytest
import tables

NUMBER = re.compile(r"(?<![\d.])\d[\d,]*\.\d+(?![\d.])")


@pytest.mark.parametrize("page", tables.PAGES)
def test_committed_tables_are_those_of_the_results(page):
    text = (tables.TOP / page).read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- /table -->") > 0
    assert tables.written(text) == text, "make tables"


def test_figures_are_drawn_and_committed():
    for name, draw in {
        **figures.DRAWN,
        "card": figures.draw_card,
    }.items():
        figure = draw()
        assert all(ax.lines or ax.patches for ax in figure.axes)
        plt.close(figure)
        assert (figures.FIGURES / f"{name}.png").is_file()


def test_numbers_with_decimals_in_the_studys_prose_are_in_its_tables():
    pages = [(tables.TOP / page).read_text(encoding="utf-8") for page in tables.PAGES[:2]]
    table = r"<!-- table: \w+ -->.*?<!-- /table -->"
    parts = re.findall(table, "".join(pages), re.S)
    shown = {number.replace(",", "") for part in parts for number in NUMBER.findall(part)}
    for page in pages:
        checked = re.split(r"\n## (?:Limits|What each)", page)[0]
        prose = re.sub(rf"{table}|\]\(.*?\)", "", checked, flags=re.S)
        assert {*NUMBER.findall(prose)} <= shown


def test_the_appendix_has_all_pairs_with_both_intervals_and_the_study_has_one():
    for name, (pairs, more) in tables.PAIRS.items():
        one, both = tables.TABLES[name](), tables.TABLES[f"{name}_both"]()
        assert ";" not in one
        assert both.count(";") >= one.count(" to ") > 0
        assert len(both.splitlines()) == len(one.splitlines()) + len(more) == len(pairs + more) + 2
