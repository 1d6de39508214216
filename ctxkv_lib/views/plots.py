"""Interactive plots for notebooks: widgets around the static figures. No pyplot, no ipympl, no plotly.

Every plot is a PNG in an `ipywidgets.Image` (`live` says why), drawn anew when a control moves; that works in
Colab, JupyterLab and VS Code, with ipywidgets 7.7 and 8. The objects returned are widgets: a cell that ends
with one shows it. Their controls are attributes, so that a test, or a notebook, can set them by name.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from ..errors import UserError
from ..files import write_text
from ..runs.published import PUBLISHED
from ..runs.run_folder import Run, load_run
from . import figures, markup, pictures
from .explore import SPLITS, Trained, attended_window, open_run
from .live import LiveCurves as LiveCurves
from .live import page_width, png, show_in

WIDE = widgets.Layout(width="480px")
STYLE = {"description_width": "90px"}
PUBLISHED_LABEL = "published report, 500 samples (L4)"


def show(figure: Figure) -> None:
    """Display a figure under the cell."""
    from IPython.display import Image, display

    display(Image(data=png(figure), format="png", width=page_width(figure)))


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
        log_scale, epochs, epoch: scale, range shown, and the epoch of the table.
        values: the table, as HTML. figure: what is drawn. message: where exports went.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._loaded = list(runs)
        self._labels = figures.run_labels([run.summary for run in runs])
        self._colours = figures.colours(runs)
        last = max(run.summary["phase2"]["epochs"][-1]["epoch"] for run in runs)
        self.runs = [_checkbox(label) for label in self._labels]
        self.curves = {name: _checkbox(name, name != "accuracy") for name in figures.CURVES}
        self.log_scale = _checkbox("log scale")
        self.epochs = widgets.IntRangeSlider(
            value=(1, last), min=1, max=last, description="Epochs", layout=WIDE, style=STYLE
        )
        self.epoch = widgets.IntSlider(
            value=1, min=1, max=last, description="Values at", layout=WIDE, style=STYLE
        )
        self.save_png = widgets.Button(description="Save PNG", icon="image")
        self.save_csv = widgets.Button(description="Save CSV", icon="table")
        self.message = widgets.Label()
        self.values = widgets.HTML()
        self.image = widgets.Image(format="png")
        self.figure: Figure | None = None
        self._connect()
        super().__init__(
            [
                widgets.HBox(self.runs),
                widgets.HBox([*self.curves.values(), self.log_scale]),
                self.epochs,
                self.image,
                self.epoch,
                self.values,
                widgets.HBox([self.save_png, self.save_csv, self.message]),
            ]
        )
        self._draw()
        self._tabulate()

    def _connect(self) -> None:
        for control in (*self.runs, *self.curves.values(), self.log_scale, self.epochs):
            control.observe(self._on_change, names="value")
        self.epoch.observe(lambda _: self._tabulate(), names="value")
        self.save_png.on_click(lambda _: self._export_png())
        self.save_csv.on_click(lambda _: self._export_csv())

    def _on_change(self, _: Any) -> None:
        self._draw()
        self._tabulate()

    def _chosen(self) -> list[tuple[str, Run]]:
        boxes = zip(self.runs, self._labels, self._loaded, strict=True)
        return [(label, run) for box, label, run in boxes if box.value]

    def _draw(self) -> None:
        chosen = self._chosen()
        curves = [name for name, box in self.curves.items() if box.value]
        if not chosen or not curves:
            self.figure = None
            self.image.layout.display = "none"
            self.message.value = "Choose at least one run and one curve."
            return
        self.figure = figures.ppl_curves(
            [run.summary for _, run in chosen],
            [label for label, _ in chosen],
            curves,
            self.log_scale.value,
            self.epochs.value,
            [colour for colour, box in zip(self._colours, self.runs, strict=True) if box.value],
        )
        self.image.layout.display = None
        self.message.value = ""
        show_in(self.image, self.figure)

    def _tabulate(self) -> None:
        rows = []
        for label, run in self._chosen():
            epochs = run.summary["phase2"]["epochs"]
            line = next((line for line in epochs if line["epoch"] == self.epoch.value), None)
            rows.append([label, *(_cells(line) if line else ["not trained so long", "", "", ""])])
        header = [f"Epoch {self.epoch.value}", "train PPL", "validation PPL", "accuracy", "val / train"]
        self.values.value = markup.table(header, rows)

    def _folder(self) -> Path:
        return self._loaded[0].path.parent / "explored"

    def _export_png(self) -> None:
        if self.figure is None:
            self.message.value = "Nothing to save: choose at least one run and one curve."
            return
        self.message.value = f"Saved {figures.save(self.figure, self._folder() / 'curves.png')}"

    def _export_csv(self) -> None:
        path = self._folder() / "curves.csv"
        first, last = self.epochs.value
        keys = ("epoch", "train_ppl", "val_ppl", "val_acc", "no_improve", "seconds")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["run", *keys])
        for label, run in self._chosen():
            for line in run.summary["phase2"]["epochs"]:
                if first <= line["epoch"] <= last:
                    writer.writerow([label, *(line[key] for key in keys)])
        write_text(path, text.getvalue())
        self.message.value = f"Saved {path}"


def explore_runs(run_folders: Sequence[Path | str]) -> RunExplorer:
    """Choose runs, curves, scale and epochs; read values under a slider; export PNG and CSV.

    Args:
        run_folders: one or more finished runs. Exports go to `explored/` beside the first of them.

    Raises:
        UserError: no folders, or one that holds no finished run.
    """
    if not run_folders:
        raise UserError("There are no runs to explore; name at least one run folder.")
    return RunExplorer([load_run(folder) for folder in run_folders])


class WindowExplorer(widgets.VBox):
    """What one position attends; see `explore_window`.

    Attributes:
        split, position, head: the controls; head 0 is the mean of all heads.
        text, guesses: HTML of the window's tokens and of the next-token guesses.
        figure: attention by distance.
    """

    def __init__(self, trained: Trained, position: int, split: str) -> None:
        trained.check_position(split, position)
        self._trained = trained
        heads = trained.model.config.num_heads
        self.split = widgets.Dropdown(
            options=[("validation", "val"), ("training", "train")],
            value=split,
            description="Stream",
            style=STYLE,
        )
        self.head = widgets.Dropdown(
            options=[("mean of all heads", 0), *((f"head {n}", n) for n in range(1, heads + 1))],
            description="Attention",
            style=STYLE,
        )
        self.position = widgets.IntSlider(
            value=position,
            min=0,
            max=len(trained.caches[split]) - 1,
            description="Position",
            continuous_update=False,
            layout=WIDE,
            style=STYLE,
        )
        self.image = widgets.Image(format="png")
        self.guesses = widgets.HTML()
        self.text = widgets.HTML()
        self.figure: Figure | None = None
        self.split.observe(self._on_split, names="value")
        for control in (self.position, self.head):
            control.observe(lambda _: self._draw(), names="value")
        controls = widgets.HBox([self.split, self.head])
        super().__init__([controls, self.position, self.image, self.guesses, self.text])
        self._draw()

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
        show_in(self.image, self.figure)
        self.guesses.value = markup.guesses_line(window)
        self.text.value = markup.attended_text(window, weights.tolist())


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


def _checkbox(label: str, value: bool = True) -> widgets.Checkbox:
    return widgets.Checkbox(
        value=value, description=label, indent=False, layout=widgets.Layout(width="150px")
    )


def _cells(line: dict[str, Any]) -> list[str]:
    ratio = line["val_ppl"] / line["train_ppl"]
    ppls = [f"{line[key]:,.1f}" for key in ("train_ppl", "val_ppl")]
    return [*ppls, f"{line['val_acc']:.1%}", f"{ratio:,.2f}x"]
