"""`LiveCurves` draws the curves of a training run in a notebook, and prints lines of text elsewhere."""

import math
import time
from typing import Any

from ..method.callback import Metric, epochs_of
from ..method.config import Phase1Config
from ..progress import in_notebook, in_words, run_name
from .figures import Picture, loss_curves, phase1_curves, ppl_curves

# Minimum number of seconds between two drawings. A drawing takes about 0.2 s, i.e. 2% of the time.
DRAW_SECONDS = 10.0


class LiveCurves:
    """A listener for `run`, `prepare` and `compare` that draws the curves of both phases.

    In Phase 1, the curves show convergence and loss. In Phase 2, they show perplexity by epoch or, until each
    run has finished its first epoch, the training loss by step.

    Example: `run(config, listener=LiveCurves())`
    """

    def __init__(self, stop_rate: float | None = Phase1Config.stop_rate) -> None:
        """Create the listener. A line shows `stop_rate`, the share of converged positions to end Phase 1."""
        self._stop_rate, self._stage, self._due = stop_rate, "phase1", 0.0
        self._lines: dict[str, dict[str, list[Metric]]] = {"phase1": {}, "phase2": {}}
        self._place: Any = None

    def __call__(self, metric: Metric, **names: Any) -> None:
        """Receive one metric. Its run is named by `run` or `samples`, in the metric or in `names`."""
        metric = metric | names
        if not in_notebook():
            if "step" not in metric:
                print(in_words(metric), flush=True)
            return
        if self._place is None:
            self._open()
        self._stage = metric["stage"]
        lines = self._lines[self._stage].setdefault(run_name(metric) or "this run", [])
        if lines and _position(metric) <= _position(lines[-1]):
            lines.clear()  # `run` was called again
        lines.append(metric)
        if len(lines) == 1 or time.monotonic() >= self._due:
            self.draw()

    def _open(self) -> None:
        """Open a display below the running cell."""
        from IPython import get_ipython
        from IPython.display import Pretty, display

        self._place = display(Pretty("Training begins."), display_id=True)
        get_ipython().events.register("post_run_cell", self.finish)

    def draw(self) -> None:
        """Draw all metrics so far. The new drawing replaces the last drawing."""
        figure = self.figure()
        last = next(reversed(self._lines[self._stage].values()))[-1]
        figure.suptitle(in_words(last), x=0.01, ha="left", fontsize=11)
        self._place.update(figure)
        self._due = time.monotonic() + DRAW_SECONDS

    def figure(self) -> Picture:
        """Draw the curves of the current stage."""
        runs = self._lines[self._stage]
        if self._stage == "phase1":
            return phase1_curves(runs, self._stop_rate)
        epochs = {name: epochs_of(lines) for name, lines in runs.items()}
        if not all(epochs.values()):
            return loss_curves(
                {name: [line for line in lines if "step" in line] for name, lines in runs.items()}
            )
        summaries = {}
        for name, lines in epochs.items():
            best = next(line for line in reversed(lines) if line["improved"])
            summaries[name] = {"phase2": {**best, "epochs": lines, "best_epoch": best["epoch"]}}
        return ppl_curves(summaries)

    def finish(self, result: Any = None) -> None:
        """Draw the last metrics. IPython calls this when the cell ends, even after an error."""
        from IPython import get_ipython

        get_ipython().events.unregister("post_run_cell", self.finish)
        self.draw()
        self._place = None


def _position(metric: Metric) -> tuple[float, float]:
    """Return a metric's position in its stage. The metric of an epoch comes after the steps of the epoch."""
    return metric.get("iteration") or metric["epoch"], metric.get("step", math.inf)
