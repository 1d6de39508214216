"""Curves that answer, and the explorer of a window: what is shown, and what a changed control draws."""

import json
import sys
from html import escape

import pytest
import torch
from ipywidgets import HTML
from sample_runs import sample_run, write_run

from ctxkv_lib.errors import UserError
from ctxkv_lib.views.curves import PLOTLY, explore_runs, plotly_curves
from ctxkv_lib.views.explore import attended, explore_window


def page(explorer):
    (html,) = [child for child in explorer.children if isinstance(child, HTML)]
    return html.value


def test_runs_are_shown_by_plotly_as_a_page_and_as_a_picture(tmp_path):
    shown = explore_runs([sample_run(100), write_run(tmp_path / "run", 500)])._repr_mimebundle_()
    assert {*shown} == {PLOTLY, "text/html", "image/png", "text/plain"}
    assert shown["image/png"].startswith(b"\x89PNG")
    assert len(json.dumps(shown[PLOTLY])) + len(shown["text/html"]) < 30_000
    assert [trace["name"] for trace in shown[PLOTLY]["data"] if trace["showlegend"]] == [
        "100 samples",
        "500 samples",
    ]


def test_a_run_has_validation_accuracy_training_and_n_grams_that_the_legend_switches_together():
    summary = sample_run(100).summary
    summary["ngrams"] = {"kneser_ney": {"val_ppl": 922.2}}
    validation, accuracy, training, ngrams = plotly_curves({"a run": summary}).data
    assert {trace.legendgroup for trace in (validation, accuracy, training, ngrams)} == {"a run"}
    assert (validation.y[2], training.y[2]) == (366.4, 198.6)
    assert validation.marker.symbol == ("circle", "circle", "circle-open", *["circle"] * 3)
    assert (accuracy.yaxis, accuracy.y[2], training.line.dash) == ("y2", 0.159, "dash")
    assert ngrams.y == (922.2,) * 6


def test_a_logarithmic_axis_ends_a_little_beyond_the_curves_and_a_linear_one_begins_at_zero():
    layout = plotly_curves({"a run": sample_run(100).summary}).layout
    shown = [10**end for end in layout.yaxis.range]
    assert shown == pytest.approx([61.1 / 1.2, 580.3 * 1.2])  # training at the end, validation at the start
    log, linear = (button.args[0]["yaxis.range"] for button in layout.updatemenus[0].buttons)
    assert [*log] == [*layout.yaxis.range]
    assert [*linear] == pytest.approx([0, 580.3 * 1.2])


def test_eight_runs_have_eight_looks():
    traces = plotly_curves({f"run {n}": sample_run(100).summary for n in range(8)}).data
    points = [trace for trace in traces if trace.showlegend]
    assert len({(trace.line.color, trace.marker.symbol[0]) for trace in points}) == 8


def test_without_plotly_a_sentence_stands_beside_the_picture(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    shown = explore_runs(sample_run())._repr_mimebundle_()
    assert {*shown} == {"image/png", "text/plain"}
    assert "get it by `pip install plotly`" in capsys.readouterr().err


def test_no_run_is_refused():
    with pytest.raises(UserError, match="name at least one run folder"):
        explore_runs([])


def test_a_window_shows_its_tokens_with_the_attention_of_the_chosen_head(trained):
    explorer = explore_window(trained, position=20)
    cache, window = trained.caches["val"], trained.model.window
    for slot in window.slots(cache.ids.new_tensor([20]))[0].tolist():
        assert f'title="{slot}: ' in page(explorer)
    following = trained.tokenizer.decode([int(cache.ids[21])])
    assert f'border-bottom:2px solid">{following}<' in page(explorer)
    shares = attended(trained, 20)[2].softmax(dim=-1)
    share = shares[cache.ids[21]]
    rank = 1 + (shares > share).sum()
    true = f"<b>{escape(repr(following))}</b> {share:.1%}, number {rank:,} of the guesses"
    assert f"The next token is {true}." in page(explorer)
    heights = [bar.get_height() for bar in explorer.figure.axes[0].patches]
    assert sum(heights) == pytest.approx(100, abs=0.01)
    weights = trained.model.read(trained.model.batch(cache, torch.tensor([20])))[1][0]
    for number, head in enumerate(weights.tolist()):
        explorer.controls["head"].value = f"head {number}"
        heights = [bar.get_height() for bar in explorer.figure.axes[0].patches]
        assert heights == pytest.approx([100 * share for share in head], abs=0.01)
    explorer.controls["head"].value = "head 2"
    explorer.controls["position"].value = 3  # with slots before the stream
    assert "What position 3 attends: head 2" in explorer.figure.axes[0].get_title(loc="left")
    assert page(explorer).count("of the attention") == 2


def test_a_position_that_is_not_there_is_refused(trained):
    last = len(trained.caches["val"]) - 1
    for position in (-1, last + 1, "first"):
        with pytest.raises(UserError, match=f"allowed in this validation stream: 0 to {last}"):
            explore_window(trained, position)
