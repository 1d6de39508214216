"""Interactive plots for notebooks: widgets around the static figures. No pyplot, no ipympl, no plotly.

Every plot is an image in an `ipywidgets.HTML` (`markup` says why), drawn anew when a control moves; that
works in Colab, JupyterLab and VS Code, with ipywidgets 7.7 and 8. The objects returned are widgets: a cell
that ends with one shows it. Their controls are attributes, so that a test, or a notebook, can set them.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from ..errors import UserError
from ..runs.differences import run_folders, run_names
from ..runs.published import PUBLISHED
from ..runs.run_folder import Run, load_run
from . import figures, markup, pictures
from .axes import colours
from .explore import SPLITS, Trained, Window, attended_window, open_run, token_texts

WIDE = {"width": "480px", "max_width": "98%"}
ROW = {"flex_flow": "row wrap"}
STYLE = {"description_width": "90px"}
PUBLISHED_LABEL = "published report, 500 samples (L4)"
HEADING = ("an attended token ...", -1)  # of a choice of positions
NO_WIDTH = "\u200b"
LEGEND_LETTERS = 40  # of a run's name: longer ones would leave no room for the curves


def memory_timeline(run: Run | Sequence[dict[str, Any]]) -> Figure:
    """CPU and GPU memory (GiB) by stage, with the published report's numbers in the panel beside it.

    Args:
        run: a finished run, or the `memory` entries of one that is under way.
    """
    memory = run.summary["memory"] if isinstance(run, Run) else run
    return figures.memory_by_stage([{"memory": memory}, PUBLISHED[500]], ["this run", PUBLISHED_LABEL])


class RunExplorer(widgets.VBox):
    """Curves of several runs; see `explore_runs`.

    Attributes:
        runs: a checkbox a run, in the order given. curves: a checkbox for each of `figures.CURVES`.
        log_scale, epochs, epoch: scale, range shown, and the epoch marked in the plot and read in the table.
        values: the table, as HTML. figure: what is drawn. downloads: links, as HTML. message: what to choose.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._loaded = list(runs)
        self._labels = run_names(runs)
        self._colours = colours(runs)
        phase2 = [run.summary["phase2"] for run in runs]
        last = max(each["epochs"][-1]["epoch"] for each in phase2)
        best = min(phase2, key=lambda each: each["val_ppl"])["best_epoch"]
        self.runs = [_checkbox(label) for label in self._labels]
        self.curves = {name: _checkbox(name, name != "accuracy") for name in figures.CURVES}
        self.log_scale = _checkbox("log scale")
        self.epochs = _slider(widgets.IntRangeSlider, "Epochs", (1, last), 1, last)
        self.epoch = _slider(widgets.IntSlider, "Values at", best, 1, last)
        self.message = widgets.Label()
        self.values = widgets.HTML()
        self.image = widgets.HTML()
        self.downloads = widgets.HTML()
        self.figure: Figure | None = None
        for control in (*self.runs, *self.curves.values(), self.log_scale, self.epochs, self.epoch):
            control.observe(lambda _: self._draw(), names="value")
        super().__init__(
            [
                _row(self.runs),
                _row([*self.curves.values(), self.log_scale]),
                self.epochs,
                self.message,
                self.image,
                self.epoch,
                self.values,
                self.downloads,
            ]
        )
        self._draw()

    def _chosen(self) -> list[tuple[str, Run]]:
        boxes = zip(self.runs, self._labels, self._loaded, strict=True)
        return [(label, run) for box, label, run in boxes if box.value]

    def _draw(self) -> None:
        chosen = self._chosen()
        curves = [name for name, box in self.curves.items() if box.value]
        shown = bool(chosen and curves)
        self.message.value = "" if shown else "Choose at least one run and one curve."
        for part in (self.image, self.downloads):
            part.layout.display = None if shown else "none"
        self.values.value = markup.themed(self._table())
        self.figure = self._figure(chosen, curves) if shown else None
        if self.figure is not None:
            image = markup.png(self.figure)
            self.image.value = markup.figure_html(self.figure, image)
            links = (
                markup.download_link("curves.png", image, "image/png"),
                markup.download_link("curves.csv", self._csv().encode(), "text/csv"),
            )
            self.downloads.value = " &nbsp; ".join(links)

    def _figure(self, chosen: Sequence[tuple[str, Run]], curves: Sequence[str]) -> Figure:
        first, last = self.epochs.value
        return figures.ppl_curves(
            [run.summary for _, run in chosen],
            [_short(label) for label, _ in chosen],
            curves,
            self.log_scale.value,
            (first, last),
            [colour for colour, box in zip(self._colours, self.runs, strict=True) if box.value],
            self.epoch.value if first <= self.epoch.value <= last else None,
        )

    def _table(self) -> str:
        rows = []
        for label, run in self._chosen():
            epochs = run.summary["phase2"]["epochs"]
            line = next((line for line in epochs if line["epoch"] == self.epoch.value), None)
            rows.append([label, *(_cells(line) if line else ["not trained so long", "", "", ""])])
        header = [f"Epoch {self.epoch.value}", "train PPL", "validation PPL", "accuracy", "val / train"]
        return markup.table(header, rows)

    def _csv(self) -> str:
        first, last = self.epochs.value
        keys = ("epoch", "train_ppl", "val_ppl", "val_acc", "no_improve", "seconds")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["run", *keys])
        for label, run in self._chosen():
            for line in run.summary["phase2"]["epochs"]:
                if first <= line["epoch"] <= last:
                    writer.writerow([label, *(line[key] for key in keys)])
        return text.getvalue()


def explore_runs(places: Path | str | Sequence[Path | str]) -> RunExplorer:
    """Choose runs, curves, scale and epochs; read values under the pointer or a slider; download PNG and CSV.

    Args:
        places: run folders, or folders that finished runs lie in; one, or several.

    Raises:
        UserError: no folders, or one that holds no finished run.
    """
    folders = run_folders(places)
    if not folders:
        raise UserError("There are no runs to explore; name at least one run folder.")
    return RunExplorer([load_run(folder) for folder in folders])


class WindowExplorer(widgets.VBox):
    """What one position attends; see `explore_window`.

    Attributes:
        split, position, head: the controls; head 0 is the mean of all heads.
        steps: buttons, `{tokens to go on: button}`. near: the tokens around as buttons, the position's own
            pressed; a click moves there. tokens: the attended tokens; choosing one moves there.
        text, guesses: HTML of the window's tokens and of the next-token guesses.
        figure: attention by distance.
    """

    def __init__(self, trained: Trained, position: int, split: str) -> None:
        trained.check_position(split, position)
        self._trained = trained
        config = trained.model.config
        streams = [("validation", "val"), ("training", "train")]
        self.split = _dropdown("Stream", streams, split)
        heads = [("mean of all heads", 0), *((f"head {n}", n) for n in range(1, config.num_heads + 1))]
        self.head = _dropdown("Attention", heads, 0)
        self.position = _slider(widgets.IntSlider, "Position", position, 0, len(trained.caches[split]) - 1)
        self.steps = {step: _step_button(step) for step in (-config.interval, -1, 1, config.interval)}
        self.tokens = _dropdown("Go to", [HEADING], HEADING[1])
        self.near = widgets.ToggleButtons(style={"button_width": "auto"}, layout=widgets.Layout(width="98%"))
        self.image = widgets.HTML()
        self.guesses = widgets.HTML()
        self.text = widgets.HTML()
        self.figure: Figure | None = None
        self._connect()
        moves = _row([*self.steps.values(), self.tokens])
        controls = _row([self.split, self.head])
        shown = [self.image, self.guesses, self.near, self.text]
        super().__init__([controls, self.position, moves, *shown])
        self._draw()

    def _connect(self) -> None:
        self.split.observe(self._on_split, names="value")
        self.tokens.observe(self._on_token, names="value")
        self.near.observe(self._on_near, names="value")
        for control in (self.position, self.head):
            control.observe(lambda _: self._draw(), names="value")
        for step, button in self.steps.items():
            button.on_click(lambda _, step=step: self._go(self.position.value + step))

    def _go(self, position: int) -> None:
        self.position.value = min(max(position, 0), self.position.max)

    def _on_token(self, change: Any) -> None:
        if change["new"] != HEADING[1]:  # which each drawing goes back to
            self._go(change["new"])

    def _on_near(self, change: Any) -> None:
        self._go(change["new"])

    def _on_split(self, change: Any) -> None:
        last = len(self._trained.caches[change["new"]]) - 1
        before = self.position.value
        self.position.value = min(before, last)  # draws by itself if it moves
        self.position.max = last
        if self.position.value == before:
            self._draw()

    def _draw(self) -> None:
        window = attended_window(self._trained, self.split.value, self.position.value)
        head = self.head.value
        weights = window.weights[head - 1] if head else window.weights.mean(dim=0)
        self.figure = pictures.window_attention(window, weights)
        self.image.value = markup.figure_html(self.figure, markup.png(self.figure))
        self.guesses.value = markup.themed(markup.guesses_line(window))
        self.text.value = markup.themed(markup.attended_text(window, weights.tolist()))
        self.tokens.options = _token_options(window, weights.tolist())
        self._offer_near()

    def _offer_near(self) -> None:
        """An interval of tokens to either side of the position."""
        cache, here = self._trained.caches[self.split.value], self.position.value
        reach = self._trained.model.config.interval
        around = range(max(0, here - reach), min(len(cache), here + reach + 1))
        pieces = token_texts(self._trained.tokenizer, cache.ids[around.start : around.stop])
        self.near.unobserve(self._on_near, names="value")  # new options press the first of them
        with self.near.hold_sync():
            self.near.options = list(zip(_button_texts(pieces), around, strict=True))
            self.near.tooltips = [f"{at:,}: {piece!r}" for at, piece in zip(around, pieces, strict=True)]
            self.near.value = here
        self.near.observe(self._on_near, names="value")


def explore_window(run: Run | Trained, position: int, split: str = "val") -> WindowExplorer:
    """Which positions a position attends and how strongly, with the tokens as text.

    Args:
        run: a finished run, or `explore.open_run` of it.
        position: a token of the stream, from 0.
        split: "val" or "train".

    Raises:
        UserError: no such position or split, or an incomplete run folder.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; allowed: {', '.join(SPLITS)}.")
    return WindowExplorer(open_run(run) if isinstance(run, Run) else run, position, split)


def _token_options(window: Window, weights: Sequence[float]) -> list[tuple[str, int]]:
    """Choices of a dropdown: a heading, then the attended tokens, nearest first."""
    options = [HEADING]
    for at, weight in zip(window.slots.tolist(), weights, strict=True):
        if at >= 0:
            options.append(
                (f"{at:,}: {window.pieces[at - window.start]!r}, {weight:.1%} of the attention", at)
            )
    return options


def _button_texts(pieces: Sequence[str]) -> list[str]:
    """No two alike to ipywidgets, which finds the pressed button by its text; what differs has no width."""
    texts: list[str] = []
    for piece in pieces:
        text = piece.strip() or repr(piece)[1:-1].replace(" ", "␣")
        texts.append(text + NO_WIDTH * sum(text == earlier.rstrip(NO_WIDTH) for earlier in texts))
    return texts


def _slider(kind: Any, name: str, value: Any, least: int, most: int) -> Any:
    options = {"description": name, "continuous_update": False, "style": STYLE}
    slider = kind(value=value, min=least, max=most, layout=widgets.Layout(**WIDE), **options)
    slider.tooltip = name  # ipywidgets 8 would say "null" under the pointer; 7.7 knows no such thing
    return slider


def _dropdown(name: str, options: Sequence[tuple[str, Any]], value: Any) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, value=value, description=name, style=STYLE)


def _step_button(step: int) -> widgets.Button:
    where = "on" if step > 0 else "back"
    tooltip = f"{abs(step)} tokens {where}" if abs(step) > 1 else f"one token {where}"
    return widgets.Button(
        description=f"{step:+d}".replace("-", "−"), tooltip=tooltip, layout=widgets.Layout(width="56px")
    )


def _checkbox(label: str, value: bool = True) -> widgets.Checkbox:
    layout = widgets.Layout(width="auto", margin="2px 16px 2px 2px")
    return widgets.Checkbox(value=value, description=label, indent=False, layout=layout)


def _row(controls: Sequence[widgets.Widget]) -> widgets.HBox:
    return widgets.HBox(controls, layout=widgets.Layout(**ROW))


def _short(label: str) -> str:
    return label if len(label) <= LEGEND_LETTERS else f"{label[: LEGEND_LETTERS - 1]}…"


def _cells(line: dict[str, Any]) -> list[str]:
    ratio = line["val_ppl"] / line["train_ppl"]
    ppls = [f"{line[key]:,.1f}" for key in ("train_ppl", "val_ppl")]
    return [*ppls, f"{line['val_acc']:.1%}", f"{ratio:,.2f}x"]
