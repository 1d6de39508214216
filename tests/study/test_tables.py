"""The tables on the study's page and in the README are what its results say."""

import matplotlib.pyplot as plt
import pytest
import tables


@pytest.mark.parametrize("page", tables.PAGES)
def test_committed_tables_are_those_of_the_results(page):
    text = (tables.TOP / page).read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- /table -->") > 0
    assert tables.written(text) == text, "make tables"


def test_figures_are_drawn_and_committed():
    for draw, name in ((tables.draw_ngrams, "study-ngrams"), (tables.draw_evidence, "study-evidence")):
        figure = draw()
        assert all(ax.lines or ax.patches for ax in figure.axes)
        plt.close(figure)
        assert (tables.FIGURES / f"{name}.png").is_file()


def test_a_number_has_its_spread_over_seeds():
    assert tables.spread([]) == "–"
    assert tables.spread([1234.56]) == "1,234.6"
    assert tables.spread([99.0, 101.0]) == "100.0 ± 1.4"
