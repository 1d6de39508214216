"""Explorers for notebooks: a figure under controls, drawn again when one changes.

They work with ipywidgets 7.7 (Colab) and 8. The picture is a value of `widgets.HTML`: of the content of an
`Output` widget, nbclient sometimes misses the end.
"""

from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import torch
from torch import Tensor

from ..errors import UserError
from ..report.tables import epochs_table, named
from ..runs.opened import OpenRun, open_run
from ..runs.summary import Run, load_run
from .figures import Picture, ppl_curves, window_attention

WIDGET = "application/vnd.jupyter.widget-view+json"
GUESSES = 5  # of the next token


class Explorer(widgets.VBox):
    """Controls above what `draw` returns of their values: a figure, and HTML below it.

    Attributes:
        controls: the widgets by name; tests and notebooks can set their values.
        figure: what was drawn last.
    """

    def __init__(self, draw: Callable[..., tuple[Picture, str]], **controls: Any) -> None:
        self.controls, self._page = controls, widgets.HTML()

        def redraw(_: Any = None) -> None:
            self.figure, below = draw(**{name: control.value for name, control in controls.items()})
            self._png = b64encode(self.figure._repr_png_()).decode()
            picture = f'<img style="max-width:100%" src="data:image/png;base64,{self._png}">'
            self._page.value = picture + below

        for control in controls.values():
            control.observe(redraw, names="value")
        redraw()
        super().__init__([*controls.values(), self._page])

    def _ipython_display_(self, **_: Any) -> None:
        """Show the widget and, for readers of the saved notebook where widgets are not alive, its picture."""
        from IPython.display import display

        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        display({WIDGET: view, "image/png": self._png, "text/plain": "An explorer; run the cell."}, raw=True)


def explore_runs(runs: Run | Path | str | Sequence[Run | Path | str]) -> Explorer:
    """Choose runs, scale, accuracy and last epoch of their curves, and read the values of an epoch.

    Args:
        runs: finished runs, or their folders.

    Raises:
        UserError: no runs, or a folder without a finished run.
    """
    given = [runs] if isinstance(runs, Run | Path | str) else [*runs]
    opened = [each if isinstance(each, Run) else load_run(each) for each in given]
    if not opened:
        raise UserError("There are no runs to explore; name at least one run folder.")
    summaries = {name: run.summary for name, run in named(opened).items()}
    longest = max(len(summary["phase2"]["epochs"]) for summary in summaries.values())
    best = min(summaries.values(), key=lambda summary: summary["phase2"]["val_ppl"])["phase2"]["best_epoch"]

    def draw(runs: Sequence[str], log: bool, accuracy: bool, last: int, epoch: int) -> tuple[Picture, str]:
        chosen = {name: summaries[name] for name in runs or summaries}
        tables = {name: epochs_table(summary) for name, summary in chosen.items()}
        values = {name: table.loc[epoch] for name, table in tables.items() if epoch in table.index}
        shown = pd.DataFrame(values).T.rename_axis(columns=f"epoch {epoch}")
        return ppl_curves(chosen, log, accuracy, last, epoch), shown.to_html()

    return Explorer(
        draw,
        runs=widgets.SelectMultiple(options=[*summaries], value=[*summaries], description="runs"),
        log=widgets.Checkbox(value=True, description="log scale"),
        accuracy=widgets.Checkbox(value=False, description="accuracy"),
        last=_slider("last epoch", longest, 1, longest),
        epoch=_slider("values at", best, 1, longest),
    )


def explore_window(run: OpenRun | Run | Path | str, position: int) -> Explorer:
    """Show which contexts a position attends and how strongly, with the tokens as text.

    Args:
        run: a finished run, its folder, or `open_run` of it.
        position: a token of the validation stream, from 0.

    Raises:
        UserError: no such position, or the model of the run returns no attention weights.
    """
    trained = run if isinstance(run, OpenRun) else open_run(run)
    last = len(trained.caches["val"]) - 1
    if position not in range(last + 1):
        raise UserError(f"position is {position!r}; allowed in this validation stream: 0 to {last}.")
    count = len(attended(trained, position)[1])
    heads = ["mean of all heads", *(f"head {n + 1}" for n in range(count))]

    def draw(position: int, head: str) -> tuple[Picture, str]:
        slots, weights, logits = attended(trained, position)
        number = heads.index(head)
        shown = weights[number - 1] if number else weights.mean(dim=0)
        title = f"What position {position:,} attends: {head}"
        figure = window_attention(slots.tolist(), shown.tolist(), position, title)
        return figure, attended_text(trained, position, slots, shown) + guesses(trained, logits)

    return Explorer(
        draw,
        position=_slider("position", position, 0, last),
        head=widgets.Dropdown(options=heads, description="attention"),
    )


@torch.no_grad()
def attended(trained: OpenRun, position: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return slots (positions, negative before the stream), weights `[heads, slots]` and logits `[vocab]`."""
    model, at = trained.model, torch.tensor([position])
    batch = trained.caches["val"].batch(at, model).to(model.device)
    _, weights = batch.attend(model)
    if weights is None:
        raise UserError(f"The model of {trained.run.path} returns no attention weights to look at.")
    return model.window.slots(at)[0], weights[0].float().cpu(), batch.logits(model)[0].float().cpu()


def attended_text(trained: OpenRun, position: int, slots: Tensor, weights: Tensor) -> str:
    """Show the window's tokens, a stronger blue behind those with more attention; the next is underlined."""
    shares = {at: share for at, share in zip(slots.tolist(), weights.tolist(), strict=True) if at >= 0}
    start, strongest, spans = min(shares), max(shares.values()), []
    for at, token in enumerate(trained.caches["val"].ids[start : position + 2].tolist(), start):
        text = escape(str(trained.tokenizer.decode([token]))).replace("\n", "↵\n")
        title = f' title="{at:,}: {shares[at]:.1%} of the attention"' if at in shares else ""
        blue = 0.1 + 0.5 * shares[at] / strongest if at in shares else 0
        line = ";border-bottom:2px solid" if at == position + 1 else ""
        spans.append(f'<span{title} style="background:rgba(0,114,178,{blue:.2f}){line}">{text}</span>')
    box = "white-space:pre-wrap;max-height:340px;overflow-y:auto;background:white;color:black;padding:8px"
    return f'<pre class="tex2jax_ignore" style="{box}">{"".join(spans)}</pre>'


def guesses(trained: OpenRun, logits: Tensor) -> str:
    """Show the most likely next tokens with their probabilities."""
    shares, tokens = logits.softmax(dim=-1).topk(GUESSES)
    words = [escape(repr(trained.tokenizer.decode([token]))) for token in tokens.tolist()]
    found = (f"<b>{word}</b> {share:.1%}" for word, share in zip(words, shares.tolist(), strict=True))
    return f'<p class="tex2jax_ignore">The model expects: {", ".join(found)}</p>'


def _slider(name: str, value: int, least: int, most: int) -> widgets.IntSlider:
    """Make a slider that steps with the arrow keys, and draws when it rests."""
    layout = widgets.Layout(width="480px", max_width="98%")
    return widgets.IntSlider(value, least, most, description=name, continuous_update=False, layout=layout)
