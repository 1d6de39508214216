"""HTML of tokens and tables: nothing of a text is taken for a tag."""

import torch

from ctxkv_lib.views import explore, markup


def test_tokens_are_escaped():
    window = explore.Window(
        position=1,
        start=0,
        pieces=["<b>", "a\nb"],
        slots=torch.tensor([1, -1]),
        weights=torch.ones(1, 2) / 2,
        target="<i>",
        guesses=[("&", 0.5)],
    )
    text = markup.attended_text(window, [0.5, 0.5])
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    assert "a⏎\nb" in text
    assert "&amp;" in markup.guesses_line(window)
    assert "&lt;b&gt;" in markup.token_boundaries(["<b>"])
    assert "<td" in markup.table(["x"], [["<td"]]).replace("&lt;td", "")


def test_every_cell_of_a_table_has_its_own_colours():
    content = markup.table(["a", "b"], [["1", "2"]])
    assert content.count("background:#ffffff;color:#1f2430") == 4


def test_words_of_a_table_are_whole_and_what_is_too_long_for_a_word_is_not():
    content = markup.table(["accuracy"], [["6,324"], ["x" * 60]])
    broken = [cell for cell in content.split("<t") if "overflow-wrap:anywhere" in cell]
    assert len(broken) == 1
    assert "x" * 60 in broken[0]
