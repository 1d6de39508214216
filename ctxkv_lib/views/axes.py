"""The style all figures share, and how they are saved.

Colours are Okabe and Ito's palette, which colour-blind readers can distinguish. The background is set, so
figures look the same on a dark page and in a dark style of the user's. Figures use matplotlib's object API:
no pyplot, no global state.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, LogLocator, MaxNLocator, NullFormatter

from ..files import replacing

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLUE, ORANGE = OKABE_ITO[:2]
PAPER, INK, QUIET, RULE = "#ffffff", "#1f2430", "#6b7280", "#e3e6eb"
DPI = 150
WIDTH = 9.6  # inches of every figure; on a page of 620 pixels its words are still 10 pixels high
LETTERS = 44  # of a name in one line
NUMBER = "{x:,.10g}"  # of a tick: plain, with thousands separators
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.facecolor": PAPER,
    "axes.labelcolor": "black",
    "axes.prop_cycle": cycler(color=OKABE_ITO),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 11,
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "lines.markersize": 3.5,
    "savefig.bbox": None,  # cropped, values would not be under the pointer
    "text.color": "black",
    "text.parse_math": False,  # names of runs and settings may hold dollar signs
    "text.usetex": False,
    "ytick.color": "black",
}
styled = rc_context(STYLE)  # a decorator of functions that draw


@styled
def save(figure: Figure, path: Path) -> Path:
    """Write `figure` as a PNG, complete or not at all."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=DPI, facecolor=PAPER, metadata={"Software": None})
    return path


@styled
def panels(count: int, height: float, rows: int = 1, **share: Any) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` axes in `rows` rows, `height` in inches; `share` as in `Figure.subplots`."""
    figure = Figure(figsize=(WIDTH, height), facecolor=PAPER, layout="constrained")
    axes = list(figure.subplots(rows, -(-count // rows), squeeze=False, **share).flat)
    for unused in axes[count:]:
        unused.remove()
    for ax in axes[:count]:
        ax.grid(True, color=RULE, lw=0.8)
        ax.tick_params(colors=INK)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(NUMBER)
            axis.isDefault_majfmt = True  # bars have names instead
    return figure, axes[:count]


def legend_below(figure: Figure, *axes: Axes) -> Figure:
    """Put one legend of `axes` under the figure, where it covers no data, and return the figure."""
    handles = {  # equal labels appear once
        label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    longest = max(len(line) for label in handles for line in label.splitlines())
    columns = 4 if longest < 20 else 2 if longest < 60 else 1
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)
    return figure


def named_rows(ax: Axes, names: Iterable[str]) -> None:
    """Give each name a row of the y axis, the first one on top."""
    names = list(map(wrapped, names))
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(False, axis="y")


def wrapped(name: str) -> str:
    """Break a long name into lines."""
    return fill(name, LETTERS)


def integer_x(ax: Axes, label: str) -> None:
    """Label the x axis, with ticks at whole numbers only."""
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def log_y(ax: Axes, label: str) -> None:
    """Make the y axis logarithmic, with plain numbers as tick labels."""
    ax.set_yscale("log")
    ax.set_ylabel(label)
    low, high = ax.get_ylim()
    steps = (1,) if high > 1000 * low else (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)
    is_narrow = high < 2.5 * low  # where powers and their multiples are hardly any ticks
    ax.yaxis.set_major_locator(AutoLocator() if is_narrow else LogLocator(subs=steps))
    ax.yaxis.set_major_formatter(NUMBER)
    ax.yaxis.set_minor_formatter(NullFormatter())


def reference(draw: Callable[..., Line2D], value: float, label: str = "_", **style: Any) -> Line2D:
    """Draw a grey reference line across the axes with `ax.axhline` or `ax.axvline`."""
    return draw(value, **{"color": QUIET, "ls": "--", "lw": 1.2, "label": label, **style})
