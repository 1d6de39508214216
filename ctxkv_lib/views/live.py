"""`LiveCurves`: the curves of a training while it runs, in a notebook; lines of text elsewhere."""

import time
from typing import Any

from ..method.config import Phase1Config
from ..method.loop import Metric
from ..progress import in_notebook, in_words, run_name
from .figures import Picture, phase1_curves, ppl_curves

DRAW_SECONDS = 1.0  # between two drawings of a stage, at least ...
SHARE = 0.05  # ... and the largest share of the time for drawing
LATEST = 3  # runs whose curves are drawn: the newest
COUNTS = {"phase1": "iteration", "phase2": "epoch"}  # what numbers the lines of a stage


class LiveCurves:
    """A listener for `run`, `prepare` and `compare`: convergence and loss in Phase 1, perplexity in Phase 2.

    run(config, listener=LiveCurves())
    """

    def __init__(self, stop_rate: float | None = Phase1Config.stop_rate) -> None:
        """Take the place under the cell; `stop_rate` is drawn as the line at which Phase 1 stops."""
        self._stop_rate, self._stage, self._due, self._is_behind = stop_rate, "phase1", 0.0, False
        self._lines: dict[str, dict[str, list[Metric]]] = {"phase1": {}, "phase2": {}}
        self._place: Any = None
        self._open()

    def _open(self) -> None:
        """Take a place under the cell that is running, if it is one of a notebook."""
        if in_notebook():
            from IPython import get_ipython
            from IPython.display import display

            self._place = display("Reading conversations and token table ...", display_id=True)
            get_ipython().events.register("post_run_cell", self.finish)

    def __call__(self, metric: Metric) -> None:
        """Take one metric; `run` or `samples` name its run, if present."""
        if self._place is None:
            self._open()  # in another cell than the one before
        if self._place is None:
            print(in_words(metric), flush=True)
            return
        is_new, self._stage = metric["stage"] != self._stage, metric["stage"]
        lines = self._lines[self._stage].setdefault(run_name(metric) or "this run", [])
        count = COUNTS[self._stage]
        if lines and metric[count] <= lines[-1][count]:
            lines.clear()  # another call, which begins anew
        lines.append(metric)
        self._is_behind = True
        if is_new or len(lines) == 1 or time.monotonic() >= self._due:
            self.draw()

    def draw(self) -> None:
        """Draw what has come so far in the place of the drawing before."""
        began = time.monotonic()
        figure = self.figure()
        last = next(reversed(self._lines[self._stage].values()))[-1]
        figure.suptitle(in_words(last), x=0.01, ha="left", fontsize=11)
        self._place.update(figure)
        ended = time.monotonic()
        self._due = ended + max(DRAW_SECONDS, (ended - began) / SHARE)
        self._is_behind = False

    def figure(self) -> Picture:
        """Make the curves of the stage in training."""
        runs = dict([*self._lines[self._stage].items()][-LATEST:])
        if self._stage == "phase1":
            return phase1_curves(runs, self._stop_rate)
        summaries = {}
        for name, lines in runs.items():
            best = next(line for line in reversed(lines) if line["improved"])
            summaries[name] = {"phase2": {**best, "epochs": lines, "best_epoch": best["epoch"]}}
        return ppl_curves(summaries)

    def finish(self, result: Any = None) -> None:
        """Draw the last metrics. IPython calls this when the cell ends, also at an error."""
        from IPython import get_ipython

        get_ipython().events.unregister("post_run_cell", self.finish)
        if self._is_behind:
            self.draw()
        elif not any(self._lines.values()):
            self._place.update("Nothing was trained.")
        self._place = None
