"""What all figures share: their palette, their panels and axes, and how they are written.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; the background is set, so that a
figure reads the same on a dark page.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..files import replacing

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PAPER, INK, QUIET, RULE = "#ffffff", "#1f2430", "#6b7280", "#e3e6eb"
DPI = 150


def save(figure: Figure, path: Path | str) -> Path:
    """Write `figure` as a PNG, complete or not at all."""
    path = Path(path)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=DPI, facecolor=PAPER, metadata={"Software": None})
    return path


def panels(count: int, size: tuple[float, float], rows: int = 1, sharex: bool = False) -> tuple[Figure, list]:
    figure = Figure(figsize=size, facecolor=PAPER, layout="constrained")
    columns = -(-count // rows)
    axes = list(figure.subplots(rows, columns, sharex=sharex, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for ax in axes[:count]:
        ax.set_facecolor(PAPER)
        ax.grid(True, color=RULE, lw=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(QUIET)
        ax.tick_params(colors=INK, labelsize=10)
    return figure, axes[:count]


def legend_below(figure: Figure, ax: Axes) -> None:
    """The legend of `ax` under the figure, where it covers no mark."""
    handles, labels = ax.get_legend_handles_labels()
    columns = 4 if max(map(len, labels)) < 20 else 2
    names = [plain(label) for label in labels]
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)


def plain(text: str) -> str:
    """`text` for a figure, with its dollar signs shown and not read as the borders of a formula."""
    return text.replace("$", r"\$")


def colours(runs: Iterable[Any]) -> list[str]:
    return [OKABE_ITO[i % len(OKABE_ITO)] for i, _ in enumerate(runs)]


def integer_x(ax: Axes, label: str) -> None:
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def log_y(ax: Axes, label: str) -> None:
    ax.set_yscale("log")
    ax.set_ylabel(label)
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
