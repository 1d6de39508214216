"""`LiveCurves`: the curves of a training while it runs, in a notebook; lines of text elsewhere.

In a notebook a status line follows every metric, and the figure as often as `SHARE` of the time allows: what
a redraw costs is measured, and the next one waits until it has been earned. When the cell ends, or is
interrupted, the figure is drawn once more, with everything.

The figure is an `ipywidgets.Image` and not the content of an `Output`: a program that runs notebooks answers
each message that an `Output` catches, and nbclient (its issue 312) then misses, once in a few times, that the
cell has ended.
"""

import io
import math
import time
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from ..progress import Metric
from . import figures
from .diagram import PAPER

SHARE = 0.02  # of the elapsed time that redraws may cost
STATUS_SECONDS = 0.25  # between two status lines
DRAFT_DPI = 80  # while training; the last picture has figures.DPI
DRAFT_SIZE = (8.4, 3.4)  # inches
WIDTH = 100  # pixels of the page an inch of a figure takes


def in_notebook() -> bool:
    """Whether a kernel runs this code, and widgets can be shown."""
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def show_in(image: Any, figure: Figure, dpi: int = figures.DPI) -> None:
    """Put `figure` into an `ipywidgets.Image`, at its size in inches whatever the resolution."""
    image.width = str(page_width(figure))
    image.value = png(figure, dpi)


def png(figure: Figure, dpi: int = figures.DPI) -> bytes:
    """`figure` with its own background, as a PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi, facecolor=PAPER)
    return content.getvalue()


def page_width(figure: Figure) -> int:
    """Pixels of the page that `figure` takes."""
    return round(WIDTH * figure.get_size_inches()[0])


class LiveCurves:
    """A listener for `run`, `prepare` and `compare`: convergence and loss in Phase 1, perplexity in Phase 2.

        live = LiveCurves()
        run(config, listener=live)

    Attributes:
        figure: what was drawn last; None outside a notebook.
        image: the widget that shows it, in a notebook.
        spent: seconds that drawing has cost since the first metric.
    """

    def __init__(
        self,
        stop_rate: float | None = None,
        notebook: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Show an empty figure at once; it also tells what a redraw costs.

        Args:
            stop_rate: share of converged positions at which Phase 1 stops, drawn as a line.
            notebook: False prints text; None finds out.
            clock: seconds from any origin.
        """
        self.figure: Figure | None = None
        self.spent = 0.0
        self._stop_rate = stop_rate
        self._clock = clock
        self._lines: dict[str, dict[str, list[Metric]]] = {"phase1": {}, "phase2": {}}
        self._stage = "phase1"
        self._began: float | None = None
        self._redraw_seconds = 0.0
        self._status_at = -math.inf
        self._is_behind = False
        self._is_notebook = in_notebook() if notebook is None else notebook
        if self._is_notebook:
            self._open()

    def __call__(self, metric: Metric) -> None:
        """Take one metric; its run is told from others by `samples`, if it has one."""
        now = self._clock()
        self._began = now if self._began is None else self._began
        run = f"{metric['samples']:,} samples" if "samples" in metric else "this run"
        self._stage = metric["stage"]
        self._lines[self._stage].setdefault(run, []).append(metric)
        if not self._is_notebook:
            print(describe(metric), flush=True)
            return
        self._is_behind = True
        if now - self._status_at >= STATUS_SECONDS:
            self._status_at = now
            self._status.value = describe(metric)
        if self.spent + self._redraw_seconds <= SHARE * (now - self._began):
            self._draw(self._draft(), DRAFT_DPI)
            self._redraw_seconds = self._clock() - now
        self.spent += self._clock() - now

    def finish(self) -> None:
        """Draw everything that has come in. IPython calls this when the cell ends."""
        from IPython import get_ipython

        shell = get_ipython()
        if shell is not None and self._at_cell_end in shell.events.callbacks["post_run_cell"]:
            shell.events.unregister("post_run_cell", self._at_cell_end)
        if self._is_notebook and self._is_behind:
            last = next(reversed(self._lines[self._stage].values()))[-1]
            self._status.value = describe(last)
            self._draw(self._final(), figures.DPI)
            self._is_behind = False

    def _open(self) -> None:
        from IPython import get_ipython
        from IPython.display import display
        from ipywidgets import Image, Label, VBox

        self._status = Label("Reading conversations and token table ...")
        self.image = Image(format="png")
        display(VBox([self._status, self.image]))
        began = self._clock()
        self._draw(self._draft(), DRAFT_DPI)
        self._redraw_seconds = self._clock() - began
        shell = get_ipython()
        if shell is not None:
            shell.events.register("post_run_cell", self._at_cell_end)

    def _at_cell_end(self, *_: Any) -> None:
        self.finish()

    def _draw(self, figure: Figure, dpi: int) -> None:
        show_in(self.image, figure, dpi)
        self.figure = figure

    def _draft(self) -> Figure:
        """A figure that is quick to draw: no layout engine and no log scale."""
        stage = {"phase1": PHASE1_PANELS, "phase2": PHASE2_PANELS}[self._stage]
        figure = Figure(figsize=DRAFT_SIZE, facecolor=PAPER)
        figure.subplots_adjust(left=0.08, right=0.98, bottom=0.16, top=0.94, wspace=0.22)
        axes = figure.subplots(1, len(stage), squeeze=False)[0]
        for ax, (key, label, scale) in zip(axes, stage, strict=True):
            for colour, (run, lines) in zip(figures.OKABE_ITO * 9, self._runs(), strict=False):
                step = "iteration" if self._stage == "phase1" else "epoch"
                x, y = [line[step] for line in lines], [scale * line[key] for line in lines]
                ax.plot(x, y, color=colour, marker="o", markersize=3, label=run)
            ax.grid(True, color=figures.RULE)
            ax.set(xlabel=STEP_LABEL[self._stage], ylabel=label)
        if self._runs():
            axes[0].legend(frameon=False)
        return figure

    def _final(self) -> Figure:
        runs = self._runs()
        if self._stage == "phase1":
            rate = {} if self._stop_rate is None else {"stop_rate": self._stop_rate}
            return figures.phase1_curves(dict(runs), **rate)
        summaries = [{"phase2": _as_summary(lines)} for _, lines in runs]
        return figures.ppl_curves(summaries, [run for run, _ in runs])

    def _runs(self) -> list[tuple[str, list[Metric]]]:
        return list(self._lines[self._stage].items())


# (key of a metric, name and unit of the axis, factor)
PHASE1_PANELS = (
    ("convergence_rate", "Converged positions (%)", 100),
    ("loss", "OACD loss (no unit)", 1),
)
PHASE2_PANELS = (
    ("train_ppl", "Train perplexity per token", 1),
    ("val_ppl", "Validation perplexity per token", 1),
)
STEP_LABEL = {
    "phase1": "Iteration (one optimiser step each)",
    "phase2": "Epoch (passes over the training tokens)",
}


def describe(metric: Metric) -> str:
    """One metric as a line of text."""
    run = f"{metric['samples']:,} samples, " if "samples" in metric else ""
    if metric["stage"] == "phase1":
        return (
            f"{run}Phase 1, iteration {metric['iteration']}: loss {metric['loss']:.3f}, "
            f"{metric['convergence_rate']:.0%} of positions converged"
        )
    best = ", best so far" if metric["improved"] else f", {metric['no_improve']} without improvement"
    return (
        f"{run}Phase 2, epoch {metric['epoch']}: train PPL {metric['train_ppl']:,.1f}, "
        f"val PPL {metric['val_ppl']:,.1f}, val acc {metric['val_acc']:.1%}{best}"
    )


def _as_summary(epochs: list[Metric]) -> dict[str, Any]:
    """Epochs so far as `phase2` of a summary; whether an early stop ended them is not known here."""
    best = next(line for line in reversed(epochs) if line["improved"])
    return {
        "epochs": epochs,
        "best_epoch": best["epoch"],
        "val_ppl": best["val_ppl"],
        "stop_reason": None,
    }
