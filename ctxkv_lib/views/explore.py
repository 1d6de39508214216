"""An explorer for notebooks: attention of one position, drawn again when a control changes.

It works with ipywidgets 7.7 (Colab) and 8. The picture is a value of `widgets.HTML`: of the content of an
`Output` widget, nbclient sometimes misses the end.
"""

from base64 import b64encode
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch
from torch import Tensor

from ..errors import UserError
from ..runs.opened import OpenRun, open_run
from ..runs.summary import Run
from .figures import window_attention

WIDGET = "application/vnd.jupyter.widget-view+json"
GUESSES = 5  # of the next token


class WindowExplorer(widgets.VBox):
    """Controls above a picture of the attention, and the window's text below it.

    Attributes:
        controls: `position` and `head`; tests and notebooks can set their values.
        figure: what was drawn last.
    """

    def __init__(self, opened: OpenRun, position: int) -> None:
        last = len(opened.caches["val"]) - 1
        if position not in range(last + 1):
            raise UserError(f"position is {position!r}; allowed in this validation stream: 0 to {last}.")
        self._opened, self._page = opened, widgets.HTML()
        heads = [f"head {n}" for n in range(len(attended(opened, position)[1]))]
        slider: dict[str, Any] = {
            "continuous_update": False,
            "layout": {"width": "480px", "max_width": "98%"},
        }
        self.controls: dict[str, Any] = {
            "position": widgets.IntSlider(position, 0, last, description="position", **slider),
            "head": widgets.Dropdown(options=["mean of all heads", *heads], description="attention"),
        }
        for control in self.controls.values():
            control.observe(self._draw, names="value")
        self._draw()
        super().__init__([*self.controls.values(), self._page])

    def _draw(self, _: Any = None) -> None:
        position, head = (control.value for control in self.controls.values())
        slots, weights, logits = attended(self._opened, position)
        number = self.controls["head"].index
        chosen = weights[number - 1] if number else weights.mean(dim=0)
        title = f"What position {position:,} attends: {head}"
        self.figure = window_attention(slots.tolist(), chosen.tolist(), position, title)
        self._png = b64encode(self.figure.png()).decode()
        picture = f'<img style="width:730px;max-width:100%" src="data:image/png;base64,{self._png}">'
        text = attended_text(self._opened, position, slots, chosen)
        self._page.value = picture + text + guesses(self._opened, position, logits)

    def _ipython_display_(self, **_: Any) -> None:
        """Show the widget and, for readers of the saved notebook where it is not alive, what it shows now."""
        from IPython.display import display

        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        still = {"text/html": self._page.value, "image/png": self._png, "text/plain": "Run the cell."}
        display({WIDGET: view, **still}, raw=True)


def explore_window(run: OpenRun | Run | Path | str, position: int) -> WindowExplorer:
    """Show which contexts a position attends and how strongly, with the tokens as text.

    Args:
        run: a finished run, its folder, or `open_run` of it.
        position: a token of the validation stream, from 0.

    Raises:
        UserError: no such position, or the model of the run returns no attention weights.
    """
    return WindowExplorer(run if isinstance(run, OpenRun) else open_run(run), position)


def attended(opened: OpenRun, position: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return slots (positions, negative before the stream), weights `[heads, slots]` and logits `[vocab]`."""
    at = torch.tensor([position])
    weights, logits = opened.attention("val", at)[0], opened.logits("val", at)[0]
    return opened.model.window.slots(at)[0], weights, logits


def attended_text(opened: OpenRun, position: int, slots: Tensor, weights: Tensor) -> str:
    """Show the window's tokens, a stronger blue behind those with more attention; the next is underlined.

    The box opens at its end, the token to predict: it lays out its content from the bottom.
    """
    shares = {slot: share for slot, share in zip(slots.tolist(), weights.tolist(), strict=True) if slot >= 0}
    start, strongest, spans = min(shares), max(shares.values()), []
    for at, token in enumerate(opened.caches["val"].ids[start : position + 2].tolist(), start):
        text = escape(str(opened.tokenizer.decode([token]))).replace("\n", "↵\n")
        title = f' title="{at:,}: {shares[at]:.1%} of the attention"' if at in shares else ""
        blue = 0.1 + 0.5 * shares[at] / strongest if at in shares else 0
        line = ";border-bottom:2px solid" if at == position + 1 else ""
        spans.append(f'<span{title} style="background:rgba(0,114,178,{blue:.2f}){line}">{text}</span>')
    box = "display:flex;flex-direction:column-reverse;max-height:220px;overflow-y:auto"
    text = "white-space:pre-wrap;background:white;color:black;padding:8px;margin:0;flex:none"
    content = f'<pre class="tex2jax_ignore" style="{text}">{"".join(spans)}</pre>'
    return f'<div tabindex="0" style="{box}">{content}</div>'


def guesses(opened: OpenRun, position: int, logits: Tensor) -> str:
    """Show the most likely next tokens and the true one, with their probabilities."""
    probabilities = logits.softmax(dim=-1)
    true = int(opened.caches["val"].ids[position + 1])

    def probability(token: int) -> str:
        word = escape(repr(opened.tokenizer.decode([token])))
        return f"<b>{word}</b> {probabilities[token]:.1%}"

    likely = ", ".join(map(probability, probabilities.topk(GUESSES).indices.tolist()))
    rank = int((probabilities > probabilities[true]).sum()) + 1
    following = f"The next token is {probability(true)}, number {rank:,} of the guesses."
    return f'<p class="tex2jax_ignore">The model expects: {likely}.<br>{following}</p>'
