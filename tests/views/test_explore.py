"""The interactive curves and the explorer of a window: what they show, and what their controls change."""

import json
import sys
from base64 import b64encode
from html import escape

import pytest
import torch
from ipywidgets import HTML
from sample_runs import sample_run, write_run

from ctxkv_lib.errors import UserError
from ctxkv_lib.views.curves import PLOTLY, explore_runs, plotly_curves
from ctxkv_lib.views.explore import CONTEXT_CHOICES, attended, explore_window, percent


def page(explorer):
    (html,) = [child for child in explorer.children if isinstance(child, HTML)]
    return html.value


def test_runs_are_shown_by_plotly_as_a_page_and_as_a_picture(tmp_path):
    shown = explore_runs([sample_run(100), write_run(tmp_path / "run", 500)])._repr_mimebundle_()
    assert {*shown} == {PLOTLY, "text/html", "image/png", "text/plain"}
    assert shown["image/png"].startswith(b"\x89PNG")
    picture = b64encode(shown["image/png"]).decode()
    assert f'src="data:image/png;base64,{picture}"' in shown["text/html"]
    assert len(json.dumps(shown[PLOTLY])) + len(shown["text/html"]) - len(picture) < 30_000
    assert [trace["name"] for trace in shown[PLOTLY]["data"] if trace["showlegend"]] == [
        "sample",
        "run",
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


def test_both_axes_end_a_little_above_the_curves_and_the_linear_axis_begins_at_zero():
    layout = plotly_curves({"a run": sample_run(100).summary}).layout
    assert (layout.yaxis.type, layout.yaxis.title.text) == ("log", "Perplexity per token (log scale)")
    assert layout.yaxis.rangemode == "tozero"
    limits = layout.yaxis.autorangeoptions
    low, high = 61.1 / 1.2, 580.3 * 1.2  # last training PPL, first validation PPL
    assert [*limits.include, limits.clipmax] == pytest.approx([low, high, high])
    log, linear = (button.args[0] for button in layout.updatemenus[0].buttons)
    assert (log["yaxis.type"], linear["yaxis.type"]) == ("log", "linear")
    assert (log["yaxis.autorange"], linear["yaxis.autorange"]) == (True, True)


def test_only_buttons_change_the_axes_in_jupyterlab_and_in_html():
    shown = explore_runs(sample_run())._repr_mimebundle_()
    config = shown[PLOTLY]["config"]
    assert (config["doubleClick"], config["scrollZoom"], config["showAxisDragHandles"]) == (False,) * 3
    assert config["modeBarButtons"] == [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]]
    assert f"Plotly.newPlot(place, data, layout, {json.dumps(config)});" in shown["text/html"]


def test_hover_text_names_epoch_quantity_and_unit_and_a_swipe_scrolls_the_page():
    figure = plotly_curves({"a run": sample_run(100).summary})
    assert [trace.hovertemplate.split("%")[0] for trace in figure.data] == [
        "perplexity ",
        "accuracy ",
        "perplexity ",
    ]
    assert (figure.layout.xaxis.tickprefix, figure.layout.dragmode) == ("Epoch ", False)


def test_eight_runs_look_different():
    traces = plotly_curves({f"run {n}": sample_run(100).summary for n in range(8)}).data
    points = [trace for trace in traces if trace.showlegend]
    assert len({(trace.line.color, trace.marker.symbol[0]) for trace in points}) == 8


def test_without_plotly_a_picture_is_shown_and_a_message_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    shown = explore_runs(sample_run())._repr_mimebundle_()
    assert {*shown} == {"image/png", "text/plain"}
    assert "To install it: `pip install plotly`" in capsys.readouterr().err


def test_an_empty_list_of_runs_is_refused():
    with pytest.raises(UserError, match="give at least one run folder"):
        explore_runs([])


def test_a_window_shows_its_tokens_with_the_attention_of_the_chosen_head(trained):
    explorer = explore_window(trained, position=20)
    stream, window = trained.stream("val"), trained.model.window
    for slot in window.slots(torch.tensor([20]))[0].tolist():
        assert f'title="{slot}: ' in page(explorer)
    following = trained.tokenizer.decode([int(stream.ids[21])])
    assert f'border-bottom:2px solid">{following}<' in page(explorer)
    shares = attended(stream, 20)[2].softmax(dim=-1)
    share = shares[stream.ids[21]]
    rank = 1 + (shares > share).sum()
    true = f"<b>{escape(repr(following))}</b> {percent(share)}, number {rank:,} of the guesses"
    assert f"The next token is {true}." in page(explorer)
    heights = [bar.get_height() for bar in explorer.figure.axes[0].patches]
    assert sum(heights) == pytest.approx(100, abs=0.01)
    weights = trained.model.read(trained.model.batch(stream.stream, torch.tensor([20])))[1][0]
    for number, head in enumerate(weights.tolist()):
        explorer.controls["head"].value = f"head {number}"
        heights = [bar.get_height() for bar in explorer.figure.axes[0].patches]
        assert heights == pytest.approx([100 * share for share in head], abs=0.01)
    explorer.controls["head"].value = "head 2"
    explorer.controls["position"].value = 3  # some slots lie before the stream
    assert "What position 3 attends to: head 2" in explorer.figure.axes[0].get_title(loc="left")
    assert page(explorer).count("of the attention") == 2


def test_a_switch_gives_the_model_contexts_of_another_conversation(trained):
    explorer = explore_window(trained, position=20)
    explorer.controls["contexts"].value = CONTEXT_CHOICES[1]
    count = len(trained.streams["val"])
    first = min(trained.model.window.offsets[-1], count // 2)  # before it, slots are empty
    other = first + (20 - first + (count - first) // 2) % (count - first)
    stream = trained.stream("val")
    _, own, logits = attended(stream, 20)
    _, weights, changed = attended(stream, 20, CONTEXT_CHOICES[1])
    heights = [bar.get_height() for bar in explorer.figure.axes[0].patches]
    assert heights == pytest.approx((100 * weights.mean(dim=0)).tolist(), abs=0.01)
    assert not torch.equal(weights, own)
    assert not torch.equal(changed, logits)
    token, present = trained.streams["val"].ids[20], trained.model.window.slots(torch.tensor([other])) >= 0
    contexts = stream.contexts()[trained.model.window.slots(torch.tensor([other])).clamp(min=0)]
    window = contexts.float() * present[..., None]
    with torch.no_grad():
        expected = trained.model.apply_layer(trained.model.embed(token[None]), window, present)[1]
    torch.testing.assert_close(weights, expected[0], rtol=1e-3, atol=1e-5)
    assert "of the attention" not in page(explorer)  # the contexts come from other tokens


def test_a_position_outside_the_stream_is_refused(trained):
    last = len(trained.streams["val"]) - 1
    for position in (-1, last + 1, "first"):
        with pytest.raises(UserError, match=f"allowed in this stream: 0 to {last}"):
            explore_window(trained, position)
