"""The tables on the study's page and in the README are what its results say."""

import figures
import matplotlib.pyplot as plt
import pytest
import tables


@pytest.mark.parametrize("page", tables.PAGES)
def test_committed_tables_are_those_of_the_results(page):
    text = (tables.TOP / page).read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- /table -->") > 0
    assert tables.written(text) == text, "make tables"


def test_figures_are_drawn_and_committed():
    for name, draw in {
        **figures.DRAWN,
        "../../.github/result": figures.draw_result,
        "card": figures.draw_card,
    }.items():
        figure = draw()
        assert all(ax.lines or ax.patches for ax in figure.axes)
        plt.close(figure)
        assert (figures.FIGURES / f"{name}.png").is_file()


@pytest.mark.parametrize(
    "pair", [pair for count, *pairs in tables.PAIRS.values() if count == 10 for pair in pairs]
)
def test_a_difference_is_that_of_the_numbers_in_the_table(pair):
    variant, other = pair.split(" / ")
    for size in tables.TEN:
        if found := tables.change(10, pair, size):
            ratio = tables.mean_ppl(variant, size) / tables.mean_ppl(other, size)
            assert found.percent == pytest.approx(100 * (ratio - 1), abs=0.2)


def test_a_number_has_its_spread_over_seeds():
    assert tables.spread([]) == "–"
    assert tables.spread([1234.56]) == "1,234.6"
    assert tables.spread([99.0, 101.0]) == "100.0 ± 1.4"
