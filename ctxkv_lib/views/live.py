"""`LiveCurves`: the curves of a training while it runs, in a notebook; lines of text elsewhere.

In a notebook, status line, bar and figure change together, so all three show the same epoch: at once when a
stage begins or ends, and in between as often as `DRAW_SECONDS` and `SHARE` allow.

The figure is the value of an `ipywidgets.HTML` and not the content of an `Output`: a program that runs
notebooks answers each message that an `Output` catches, and nbclient (its issue 312) then sometimes misses
the end of the cell.
"""

import html
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from ..progress import Metric, in_notebook, in_words, run_name, watchers
from ..report.verdicts import best_epoch
from ..runs.config import Phase1Config
from . import figures, markup

DRAW_SECONDS = 1.0  # between two drawings within a stage, at least ...
SHARE = 0.05  # ... and the largest share of the time for drawing
BAR_SECONDS = 0.25  # between two changes of the bar
BAR_LETTERS = 80
COUNTS = {"phase1": "iteration", "phase2": "epoch"}  # what numbers the lines of a stage
LATEST = 3  # runs whose curves are drawn: the newest


class LiveCurves:
    """A listener for `run`, `prepare` and `compare`: convergence and loss in Phase 1, perplexity in Phase 2.

        live = LiveCurves()
        run(config, listener=live)

    Attributes:
        figure: what was drawn last; None outside a notebook.
        image, status, bar: widgets, in a notebook: the figure, its last metric in words, and what is being
            computed: a loop with tqdm's bar, or work without steps to count.
    """

    def __init__(
        self,
        stop_rate: float = Phase1Config.stop_rate,
        runs: int = 1,
        notebook: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Show an empty figure at once.

        Args:
            stop_rate: share of converged positions at which Phase 1 stops, drawn as a line.
            runs: number of runs to follow.
            notebook: False prints text; None detects a notebook.
            clock: seconds from any origin.
        """
        self.figure: Figure | None = None
        self._stop_rate, self._runs, self._clock = stop_rate, runs, clock
        self._lines: dict[str, dict[str, list[Metric]]] = {"phase1": {}, "phase2": {}}
        self._stage = "phase1"
        self._due, self._bar_at = 0.0, -math.inf
        self._loop, self._loop_began, self._loop_from = "", 0.0, 0
        self._is_behind = self._is_still = False
        self._is_notebook = in_notebook() if notebook is None else notebook
        if self._is_notebook:
            self._open()

    def __call__(self, metric: Metric) -> None:
        """Record one metric; `run` or `samples` identify its run, if present."""
        if not self._is_notebook:
            print(in_words(metric), flush=True)
            return
        if self.step not in watchers:  # another cell
            self._follow()
        self._stage = metric["stage"]
        run = run_name(metric) or "this run"
        lines, count = self._lines[self._stage].setdefault(run, []), COUNTS[self._stage]
        if lines and metric[count] <= lines[-1][count]:
            lines.clear()  # another call, which begins anew
        lines.append(metric)
        self._is_behind = True
        if len(lines) == 1 or self._clock() >= self._due:
            self._show()

    def step(self, loop: str, done: int, total: int) -> None:
        """Record one step of a training loop: `done` of `total`, which is 0 for work without steps.

        While the curves are behind and may not be drawn, the bar waits for them.
        """
        now = self._clock()
        if loop != self._loop or done == 0:
            self._loop, self._loop_began, self._loop_from, self._bar_at = loop, now, done, -math.inf
        has_ended = total == 0 or (self._stage == "phase1" and loop != "Phase 1")
        if self._is_behind and (has_ended or now >= self._due):
            self._show()
        if self._is_behind or (now - self._bar_at < BAR_SECONDS and done < total):
            return
        self._bar_at = now
        elapsed, begun = now - self._loop_began, self._loop_from  # a resumed loop begins where it stopped
        bar = f"{loop} ..."
        if total:
            bar = tqdm.format_meter(done, total, elapsed, prefix=loop, ncols=BAR_LETTERS, initial=begun)
        self.bar.value = f"<pre>{html.escape(bar)}</pre>"

    def finish(self, result: Any = None) -> None:
        """Draw all metrics so far. IPython calls this when the cell ends."""
        if not self._is_notebook:
            return
        self._registered.close()
        self.bar.value = ""
        if not any(self._lines.values()):
            self.status.value, self.image.value = "Nothing was trained.", ""
            return
        if self._is_behind:
            self._show()
        if self._output:  # a saved notebook keeps no widgets
            still = {"text/html": self.status.value + self.image.value, "text/plain": self.status.value}
            self._output.update(still, raw=True)
            self._is_still = True

    def _open(self) -> None:
        from IPython.display import display
        from ipywidgets import HTML, VBox

        self.status, self.bar, self.image = HTML("Reading conversations and token table ..."), HTML(), HTML()
        self._view = VBox([self.status, self.bar, self.image])
        has_id = hasattr(self._view, "_repr_mimebundle_")  # ipywidgets 7, as on Colab, takes no id
        self._output = display(self._view, display_id=has_id or None)
        self._draw()
        self._follow()

    def _follow(self) -> None:
        """Hear of every step, and of the end of this cell."""
        from IPython import get_ipython

        self._registered = ExitStack()
        watchers.append(self.step)
        self._registered.callback(watchers.remove, self.step)
        shell = get_ipython()
        if shell is not None:
            shell.events.register("post_run_cell", self.finish)
            self._registered.callback(shell.events.unregister, "post_run_cell", self.finish)

    def _show(self) -> None:
        """Show all metrics so far: the last one as text, with the number of its run if there are several."""
        if self._is_still:  # since the cell before has ended
            self._output.update(self._view)
            self._is_still = False
        last = next(reversed(self._lines[self._stage].values()))[-1]
        begun = len(self._lines["phase1"] | self._lines["phase2"])
        run = f"Run {begun} of {self._runs}. " if self._runs > 1 else ""
        self.status.value = html.escape(run + in_words(last))
        self._draw()
        self._is_behind = False

    def _draw(self) -> None:
        began = self._clock()
        self.figure = self._drawing()
        self.image.value = markup.figure_html(self.figure, markup.png(self.figure))
        ended = self._clock()
        self._due = ended + max(DRAW_SECONDS, (ended - began) / SHARE)

    def _drawing(self) -> Figure:
        runs = dict([*self._lines[self._stage].items()][-LATEST:])
        if self._stage == "phase1":
            return figures.phase1_curves(runs, self._stop_rate)
        return figures.ppl_curves([{"phase2": _as_summary(lines)} for lines in runs.values()], list(runs))


def _as_summary(epochs: list[Metric]) -> dict[str, Any]:
    """Return the epochs so far in the form of `phase2` of a summary, without an early stop."""
    best = best_epoch(epochs)
    return {**best, "epochs": epochs, "best_epoch": best["epoch"], "stop_reason": None}
