"""An explorer for notebooks, which shows the attention of one position and has controls to change the view.

It works with ipywidgets 7.7 (Colab) and 8. The picture is the value of a `widgets.HTML` because nbclient
sometimes loses the last part of an `Output` widget's content.
"""

from base64 import b64encode
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch
from torch import Tensor

from ..errors import UserError
from ..method.model import ContextKV
from ..method.streams import Batch, Stream
from ..runs.device import torch_state
from ..runs.opened import OpenRun, OpenStream, open_run
from ..runs.summary import Run
from .figures import window_attention

WIDGET = "application/vnd.jupyter.widget-view+json"
GUESSES = 5  # number of guesses shown for the next token
CONTEXT_CHOICES = ("of this conversation", "of another conversation")  # contexts that the model reads


class WindowExplorer(widgets.VBox):
    """A widget with controls at the top, then a picture of the attention, then the text of the window.

    Attributes:
        controls: widgets by name: `position`, `head` and `contexts` (one of `CONTEXT_CHOICES`). Tests and
            notebooks can set the widgets' values.
        figure: the figure that was drawn last.
    """

    def __init__(self, stream: OpenStream, position: int) -> None:
        last = len(stream) - 1
        if position not in range(last + 1):
            raise UserError(f"position is {position!r}; allowed in this stream: 0 to {last}.")
        self._stream, self._page = stream, widgets.HTML()
        heads = [f"head {n}" for n in range(len(attended(stream, position)[1]))]
        slider: dict[str, Any] = {
            "continuous_update": False,
            "layout": {"width": "480px", "max_width": "98%"},
        }
        self.controls: dict[str, Any] = {
            "position": widgets.IntSlider(position, 0, last, description="position", **slider),
            "head": widgets.Dropdown(options=["mean of all heads", *heads], description="attention"),
            "contexts": widgets.ToggleButtons(options=CONTEXT_CHOICES, description="contexts"),
        }
        for control in self.controls.values():
            control.observe(self._draw, names="value")
        self._draw()
        super().__init__([*self.controls.values(), self._page])

    def _draw(self, _: Any = None) -> None:
        position, head, source = (control.value for control in self.controls.values())
        slots, weights, logits = attended(self._stream, position, source)
        number = self.controls["head"].index
        chosen = weights[number - 1] if number else weights.mean(dim=0)
        title = f"What position {position:,} attends to: {head}, contexts {source}"
        self.figure = window_attention(slots.tolist(), chosen.tolist(), position, title)
        self._png = b64encode(self.figure.png()).decode()
        look = f'alt="{escape(title)}, by slot" style="width:730px;max-width:100%"'
        picture = f'<img {look} src="data:image/png;base64,{self._png}">'
        text = attended_text(self._stream, position, slots, chosen if source == CONTEXT_CHOICES[0] else None)
        self._page.value = picture + text + guesses(self._stream, position, logits)

    def _ipython_display_(self, **_: Any) -> None:
        """Show the widget, and store a still copy for readers of the saved notebook, who have no kernel."""
        from IPython.display import display

        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        still = {"text/html": self._page.value, "image/png": self._png, "text/plain": "Run the cell."}
        display({WIDGET: view, **still}, raw=True)


def explore_window(run: OpenStream | OpenRun | Run | Path | str, position: int) -> WindowExplorer:
    """Show which contexts a position attends to and how strongly, with the tokens as text.

    A switch replaces the contexts with those of a different conversation, half a stream away.

    Args:
        run: a finished run, its folder, or the result of `open_run`, all of which show the validation stream;
            or another stream, such as `open_run(...).read(text)`.
        position: a position in the stream, counted from 0.

    Raises:
        UserError: the position does not exist, or the run's model returns no attention weights.
    """
    if isinstance(run, OpenStream):
        return WindowExplorer(run, position)
    return WindowExplorer((run if isinstance(run, OpenRun) else open_run(run)).stream("val"), position)


def attended(
    stream: OpenStream, position: int, source: str = CONTEXT_CHOICES[0]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return slot positions (negative before the stream), weights `[heads, slots]` and logits `[vocab]`."""
    at, model = torch.tensor([position]), stream.opened.model
    if source == CONTEXT_CHOICES[0]:
        weights, logits = stream.attention(at)[0], stream.logits(at)[0]
        return model.window.slots(at)[0], weights, logits
    with torch.no_grad(), torch_state():
        batch = with_other_contexts(model, stream.stream, at)
        other_weights, logits = model.read(batch)[1], torch.cat([*model.predictions(batch)])
    # This model does return weights: `WindowExplorer` has already read the weights for the true contexts.
    assert other_weights is not None
    return model.window.slots(at)[0], other_weights[0].float().cpu(), logits[0].float().cpu()


def with_other_contexts(model: ContextKV, stream: Stream, positions: Tensor) -> Batch:
    """Gather the inputs of `positions`, but with contexts of a different conversation, half a stream away.

    If the stream is long enough, these contexts come from positions with a full window. Near the start of a
    stream, most slots of the window are empty.
    """
    first = min(model.window.offsets[-1], len(stream) // 2)
    other = model.batch(stream, elsewhere(positions, first, len(stream)))
    return replace(model.batch(stream, positions), inputs=other.inputs, copied=other.copied)


def elsewhere(positions: Tensor, first: int, count: int) -> Tensor:
    """Shift positions, int64 `[n]`, by half the range from `first` to `count`, and wrap at its end."""
    return first + (positions - first + (count - first) // 2) % (count - first)


def attended_text(stream: OpenStream, position: int, slots: Tensor, weights: Tensor | None) -> str:
    """Show the tokens of the window as HTML. More attention gives a token a stronger blue background.

    Without `weights`, no token is blue. The next token is underlined. The box lays out its content from the
    bottom, so that it opens scrolled to the end, where the next token is.
    """
    given = torch.zeros(len(slots)) if weights is None else weights
    shares = {slot: share for slot, share in zip(slots.tolist(), given.tolist(), strict=True) if slot >= 0}
    start, strongest, spans = min(shares), max(shares.values()), []
    for at, token in enumerate(stream.ids[start : position + 2].tolist(), start):
        text, look = escape(str(stream.opened.tokenizer.decode([token]))).replace("\n", "↵\n"), ""
        if strongest and at in shares:
            blue = f"background:rgba(0,114,178,{0.1 + 0.5 * shares[at] / strongest:.2f})"
            look = f' title="{at:,}: {percent(shares[at])} of the attention" style="{blue}"'
        if at == position + 1:
            look = ' style="border-bottom:2px solid"'
        spans.append(f"<span{look}>{text}</span>")
    box = "display:flex;flex-direction:column-reverse;max-height:220px;overflow-y:auto"
    content = (
        f'<pre class="tex2jax_ignore" style="white-space:pre-wrap;margin:0;flex:none">{"".join(spans)}</pre>'
    )
    return f'<div tabindex="0" style="{box}">{content}</div>'


def percent(share: float) -> str:
    """Format a share for HTML; a share that would round to zero becomes "< 0.1%"."""
    return f"{share:.1%}" if share >= 0.0005 else "&lt; 0.1%"


def guesses(stream: OpenStream, position: int, logits: Tensor) -> str:
    """Show the most likely next tokens and the true next token, with their probabilities, as HTML."""
    probabilities = logits.softmax(dim=-1)
    true = int(stream.ids[position + 1])

    def probability(token: int) -> str:
        word = escape(repr(stream.opened.tokenizer.decode([token])))
        return f"<b>{word}</b> {percent(float(probabilities[token]))}"

    likely = ", ".join(map(probability, probabilities.topk(GUESSES).indices.tolist()))
    rank = int((probabilities > probabilities[true]).sum()) + 1
    following = f"The next token is {probability(true)}, number {rank:,} of the guesses."
    return f'<p class="tex2jax_ignore">The model expects: {likely}.<br>{following}</p>'
