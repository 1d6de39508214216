"""The tables on the study's page and in the README agree with its results."""

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
    text = (tables.TOP / "docs" / "study.md").read_text(encoding="utf-8").split("\n## Limits")[0]
    table = r"<!-- table: \w+ -->.*?<!-- /table -->"
    shown = {
        number.replace(",", "") for part in re.findall(table, text, re.S) for number in NUMBER.findall(part)
    }
    prose = re.sub(rf"{table}|\]\(.*?\)", "", text, flags=re.S)
    assert {*NUMBER.findall(prose)} <= shown
