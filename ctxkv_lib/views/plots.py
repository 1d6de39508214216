"""Interactive plots for notebooks: widgets around the figures. No pyplot, no ipympl, no plotly.

Every plot is an image in an `ipywidgets.HTML` (`markup` says why), drawn again when a control changes; that
works in Colab, JupyterLab and VS Code, with ipywidgets 7.7 and 8. The functions return widgets, which a cell
shows if it ends with one. Controls are attributes, so that tests and notebooks can set them.
"""

import csv
import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from ..errors import UserError
from ..report.tables import percent, ppl, ratio
from ..runs.differences import run_folders, run_names
from ..runs.published import PUBLISHED
from ..runs.run_folder import Run, load_run
from . import figures, markup, pictures
from .axes import OKABE_ITO
from .explore import Trained, attended_window, open_run, token_name, token_texts

STYLE = {"description_width": "90px"}
HEADING = ("an attended token ...", -1)  # of a choice of positions
NO_WIDTH = "\u200b"
CSV_COLUMNS = ("run", "epoch", "train_ppl", "val_ppl", "val_acc", "no_improve", "seconds")


def memory_timeline(run: Run | Sequence[dict[str, Any]]) -> Figure:
    """Draw CPU and GPU memory (GiB) by stage, beside the published report's numbers.

    Args:
        run: a finished run, or the `memory` entries of one that is under way.
    """
    memory = run.summary["memory"] if isinstance(run, Run) else run
    labels = ["this run", "the original, 500 samples (L4)"]
    return figures.memory_by_stage([{"memory": memory}, PUBLISHED[500]], labels)


class RunExplorer(widgets.VBox):
    """Curves of several runs; see `explore_runs`.

    Attributes:
        runs: one checkbox per run, in the order given. curves: a checkbox for each of `figures.CURVES`.
        log_scale, epochs, epoch: scale, range shown, and the epoch marked in the plot and read in the table.
        page: figure, table and download links, as HTML. figure: the figure; None if nothing is chosen.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = dict(zip(run_names(runs), runs, strict=True))
        phase2 = [run.summary["phase2"] for run in runs]
        last = max(each["epochs"][-1]["epoch"] for each in phase2)
        best = min(phase2, key=lambda each: each["val_ppl"])["best_epoch"]
        self.runs = [_checkbox(name) for name in self._runs]
        self.curves = {name: _checkbox(name, name != "accuracy") for name in figures.CURVES}
        self.log_scale = _checkbox("log scale")
        self.epochs = _slider(widgets.IntRangeSlider, "Epochs", (1, last), 1, last)
        self.epoch = _slider(widgets.IntSlider, "Values at", best, 1, last)
        self.page = widgets.HTML()
        self.figure: Figure | None = None
        what = [*self.curves.values(), self.log_scale]
        for control in (*self.runs, *what, self.epochs, self.epoch):
            control.observe(lambda _: self._draw(), names="value")
        super().__init__([_row(self.runs), _row(what), self.epochs, self.epoch, self.page])
        self._draw()

    def _draw(self) -> None:
        chosen = {box.description: self._runs[box.description] for box in self.runs if box.value}
        curves = [name for name, box in self.curves.items() if box.value]
        if not chosen or not curves:
            self.figure = None
            self.page.value = "Choose at least one run and one curve."
            return
        first, last = self.epochs.value
        self.figure = figures.ppl_curves(
            [run.summary for run in chosen.values()],
            list(chosen),
            curves,
            self.log_scale.value,
            (first, last),
            [colour for box, colour in zip(self.runs, cycle(OKABE_ITO), strict=False) if box.value],
            self.epoch.value if first <= self.epoch.value <= last else None,
        )
        image = markup.png(self.figure)
        page = markup.figure_html(self.figure, image)
        page += markup.themed(_values_table(chosen, self.epoch.value))
        page += markup.download_link("curves.png", image, "image/png") + " &nbsp; "
        page += markup.download_link("curves.csv", _curves_csv(chosen, first, last).encode(), "text/csv")
        self.page.value = page


def _values_table(runs: dict[str, Run], epoch: int) -> str:
    rows = []
    for name, run in runs.items():
        cells = ["not trained so long", "", "", ""]
        for line in run.summary["phase2"]["epochs"]:
            if line["epoch"] == epoch:
                train, val = line["train_ppl"], line["val_ppl"]
                cells = [ppl(train), ppl(val), percent(line["val_acc"]), ratio(val / train)]
        rows.append([name, *cells])
    return markup.table([f"Epoch {epoch}", "train PPL", "validation PPL", "accuracy", "val / train"], rows)


def _curves_csv(runs: dict[str, Run], first: int, last: int) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for name, run in runs.items():
        shown = [line for line in run.summary["phase2"]["epochs"] if first <= line["epoch"] <= last]
        writer.writerows({"run": name, **line} for line in shown)
    return text.getvalue()


def explore_runs(places: Path | str | Sequence[Path | str]) -> RunExplorer:
    """Choose runs, curves, scale and epochs; read values under the pointer or a slider; download PNG and CSV.

    Args:
        places: one or several run folders, or folders with finished runs in them.

    Raises:
        UserError: no folders, or one that holds no finished run.
    """
    folders = run_folders(places)
    if not folders:
        raise UserError("There are no runs to explore; name at least one run folder.")
    return RunExplorer([load_run(folder) for folder in folders])


class WindowExplorer(widgets.VBox):
    """The attention of one position; see `explore_window`.

    Attributes:
        split, position, head: the controls; head 0 is the mean of all heads.
        steps: buttons, `{tokens to go on: button}`. near: the tokens around as buttons, the position's own
            pressed; a click moves there. tokens: the attended tokens; choosing one moves there.
        page: attention by distance and the next-token guesses, as HTML. text: the window's tokens, as HTML.
        figure: attention by distance.
    """

    def __init__(self, trained: Trained, position: int, split: str) -> None:
        trained.check_position(split, position)
        self._trained = trained
        shapes = trained.run.config.model
        heads = [("mean of all heads", 0), *((f"head {n}", n) for n in range(1, shapes.num_heads + 1))]
        self.split = _dropdown("Stream", [("validation", "val"), ("training", "train")], split)
        self.head = _dropdown("Attention", heads, 0)
        self.position = _slider(widgets.IntSlider, "Position", position, 0, len(trained.caches[split]) - 1)
        self.steps = {step: _step_button(step) for step in (-shapes.interval, -1, 1, shapes.interval)}
        self.tokens = _dropdown("Go to", [HEADING], HEADING[1])
        self.near = widgets.ToggleButtons(style={"button_width": "auto"}, layout=widgets.Layout(width="98%"))
        self.page, self.text = widgets.HTML(), widgets.HTML()
        self.figure: Figure | None = None
        self.tokens.observe(self._on_token, names="value")
        self.near.observe(self._on_token, names="value")
        for control in (self.split, self.position, self.head):
            control.observe(lambda _: self._draw(), names="value")
        for step, button in self.steps.items():
            button.on_click(lambda _, step=step: self._go(self.position.value + step))
        controls, moves = _row([self.split, self.head]), _row([*self.steps.values(), self.tokens])
        super().__init__([controls, self.position, moves, self.page, self.near, self.text])
        self._draw()

    def _go(self, position: int) -> None:
        self.position.value = min(max(position, 0), self.position.max)

    def _on_token(self, change: Any) -> None:
        if change["new"] != HEADING[1]:  # selected anew by each drawing
            self._go(change["new"])

    def _draw(self) -> None:
        self.position.max = len(self._trained.caches[self.split.value]) - 1  # lowers a position beyond it
        window = attended_window(self._trained, self.split.value, self.position.value)
        head = self.head.value
        weights = window.weights[head - 1] if head else window.weights.mean(dim=0)
        self.figure = pictures.window_attention(window, weights, self.head.label)
        image = markup.figure_html(self.figure, markup.png(self.figure))
        self.page.value = image + markup.themed(markup.guesses_line(window))
        slots = zip(window.slots.tolist(), weights.tolist(), strict=True)
        shares = {at: weight for at, weight in slots if at >= 0}
        self.text.value = markup.themed(markup.attended_text(window, shares))
        names = {at: token_name(window.pieces[at]) for at in shares}
        attended = [(f"{at:,}: {names[at]}, {shares[at]:.1%} of the attention", at) for at in shares]
        self.tokens.options = [HEADING, *attended]
        self._offer_near()

    def _offer_near(self) -> None:
        """Show an interval of tokens on either side of the position."""
        cache, here = self._trained.caches[self.split.value], self.position.value
        reach = self._trained.run.config.model.interval
        around = range(max(0, here - reach), min(len(cache), here + reach + 1))
        pieces = token_texts(self._trained.tokenizer, cache.ids[around.start : around.stop])
        self.near.unobserve(self._on_token, names="value")  # new options press the first of them
        with self.near.hold_sync():
            self.near.options = list(zip(_button_texts(pieces), around, strict=True))
            self.near.tooltips = [
                f"{at:,}: {token_name(piece)}" for at, piece in zip(around, pieces, strict=True)
            ]
            self.near.value = here
        self.near.observe(self._on_token, names="value")


def explore_window(run: Run | Path | str | Trained, position: int, split: str = "val") -> WindowExplorer:
    """Show which positions a position attends and how strongly, with the tokens as text.

    Args:
        run: a finished run or its folder, or `explore.open_run` of it.
        position: a token of the stream, from 0.
        split: "val" or "train".

    Raises:
        UserError: no such position or split, or an incomplete run folder.
    """
    return WindowExplorer(run if isinstance(run, Trained) else open_run(run), position, split)


def _button_texts(pieces: Sequence[str]) -> list[str]:
    """Make texts unique by characters without width: ipywidgets finds the pressed button by its text."""
    texts: list[str] = []
    for piece in pieces:
        text = piece.strip()
        if not text or not text.isprintable():
            text = token_name(piece)[1:-1].replace(" ", "␣")
        texts.append(text + NO_WIDTH * sum(text == earlier.rstrip(NO_WIDTH) for earlier in texts))
    return texts


def _slider(kind: Any, name: str, value: Any, least: int, most: int) -> Any:
    layout = widgets.Layout(width="480px", max_width="98%")
    options = {"description": name, "continuous_update": False, "style": STYLE, "layout": layout}
    slider = kind(value=value, min=least, max=most, **options)
    slider.tooltip = name  # else ipywidgets 8 shows "null" under the pointer; 7.7 lacks it
    return slider


def _dropdown(name: str, options: Sequence[tuple[str, Any]], value: Any) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, value=value, description=name, style=STYLE)


def _step_button(step: int) -> widgets.Button:
    tooltip = f"{abs(step)} token{'s' * (abs(step) > 1)} {'on' if step > 0 else 'back'}"
    layout = widgets.Layout(width="56px")
    return widgets.Button(description=f"{step:+d}".replace("-", "−"), tooltip=tooltip, layout=layout)


def _checkbox(label: str, value: bool = True) -> widgets.Checkbox:
    layout = widgets.Layout(width="auto", margin="2px 16px 2px 2px")
    return widgets.Checkbox(value=value, description=label, indent=False, layout=layout)


def _row(controls: Sequence[widgets.Widget]) -> widgets.HBox:
    return widgets.HBox(controls, layout=widgets.Layout(flex_flow="row wrap"))
