"""What a model brings back of pairs that it was told: by distance, and by place between slots."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .axes import OKABE_ITO, QUIET, legend_below, panels
from .figures import span


def recall_accuracy(task: Mapping[str, Any]) -> Figure:
    """Accuracy at the answers, with a standard error, beside that of guessing.

    Args:
        task: `recall_task` of a summary.
    """
    figure, axes = panels(2, size=(11, 4.4))
    titles = {
        "by_distance": ("From where it is brought back", "Distance from the told value (tokens)"),
        "by_place": ("Places between two slots", "Tokens the nearest slot has read since the value"),
    }
    for ax, (key, (title, label)) in zip(axes, titles.items(), strict=True):
        _accuracies(ax, task[key])
        ax.axhline(100 * task["accuracy"], color=QUIET, ls="--", lw=1.2, label=f"all: {task['accuracy']:.1%}")
        ax.axhline(100 / task["values"], color=OKABE_ITO[1], ls=":", lw=1.6, label="guessing a value")
        ax.set_title(title, loc="left", weight="bold")
        ax.set_xlabel(label)
        ax.set_ylim(0, 104)
    axes[0].set_ylabel("Right answers (%)")
    legend_below(figure, axes[0])
    return figure


def _accuracies(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    right = [row["accuracy"] for row in rows]
    errors = [100 * (a * (1 - a) / row["tokens"]) ** 0.5 for a, row in zip(right, rows, strict=True)]
    bars = range(len(rows))
    ax.bar(bars, [100 * a for a in right], yerr=errors, color=OKABE_ITO[0], ecolor=QUIET, width=0.75)
    ax.set_xticks(bars, map(span, rows), rotation=0 if len(rows) < 8 else 60)
    ax.grid(False, axis="x")
