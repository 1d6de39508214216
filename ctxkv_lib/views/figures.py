"""Figures of runs. Each function returns a matplotlib Figure, which a notebook shows as a cell's last value.

Colors come from the palette of Okabe and Ito, which color-blind readers can distinguish. Figures are made
without pyplot, so no figure is shown twice. Their background is white, so they look the same on a dark page.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..files import replacing
from ..report.tables import Summary, memory_stages

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Color and marker of each run, in order. When the colors repeat, the marker changes.
LOOKS: list[dict[str, Any]] = [
    {"color": color, "marker": marker} for marker in "osDv^X*" for color in OKABE_ITO
]
FEW = 3  # maximum number of runs with labels at the ends of their lines
# Color of text, axes and the zero line, in figures as on the site.
INK = "#1f2328"
GRAY = "#57606a"
# Fonts of figures, plotly and the site, which look almost the same; the first installed font is used.
FONTS = ("Arial", "Liberation Sans", "Helvetica", "DejaVu Sans")
NUMBERS = "{x:,.10g}"  # format of numbers on axes
WIDTH = 9.6  # inches
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=2 * OKABE_ITO, marker=[""] * len(OKABE_ITO) + ["s"] * len(OKABE_ITO)),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "figure.dpi": 76,  # page pixels per inch; `Picture.png` doubles this
    "font.family": ["sans-serif", "DejaVu Sans"],  # the second font has the characters that the first lacks
    "font.sans-serif": FONTS,
    "font.size": 11,
    "grid.color": "#e3e6eb",
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
# Decorator for drawing functions. It overrides the user's style, and shows dollar signs in run names as text.
styled = style.context(["default", STYLE, {"text.parse_math": False}])
# Styles of a run's lines. All lines of a run have the same color; the legend explains the styles in gray.
LINE_STYLES: dict[str, dict[str, Any]] = {
    "training": {"ls": "--", "lw": 1.4, "marker": ""},
    "validation": {"ms": 4, "marker": "o"},
    "best epoch": {"ls": "none", "marker": "o", "ms": 10, "mfc": "none", "mew": 2},
}
Lines = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl


class Picture(Figure):
    """A figure that a notebook shows even if pyplot has not been imported."""

    def png(self, pixels: int = 2) -> bytes:
        """Return the figure as a PNG, `pixels` times as wide and as high as on the page."""
        content = io.BytesIO()
        self.savefig(content, facecolor="white", dpi=pixels * self.dpi, metadata={"Software": None})
        return content.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = self.get_size_inches() * self.dpi
        return self.png(), {"width": round(width), "height": round(height)}


def panels(count: int, height: float, counted: str = "", **share: Any) -> tuple[Picture, list[Axes]]:
    """Make a figure with `count` axes in a row.

    Args:
        height: height of the figure in inches.
        counted: label of the x axes, such as "Epoch", if their ticks are whole numbers; otherwise "".
        share: keyword arguments for `Figure.subplots`, such as `sharey`.
    """
    figure = Picture(figsize=(WIDTH, height), facecolor="white")
    axes = list(figure.subplots(1, count, squeeze=False, **share).flat)
    for ax in axes:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(NUMBERS)
        ax.set_xlabel(counted)
        if counted:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure, axes


@styled
def save(figure: Picture, path: Path) -> Path:
    """Write a picture as a PNG file, atomically."""
    with replacing(path) as beside:
        beside.write_bytes(figure.png())
    return path


@styled
def ppl_curves(summaries: Mapping[str, Summary]) -> Picture:
    """Draw training and validation perplexity by epoch, with a ring at the best epoch.

    Args:
        summaries: contents of `summary.json` by run name. If n-grams were measured, a dotted line shows them.
    """
    figure, (ax,) = panels(1, 4.2 + 0.13 * len(summaries), "Epoch")
    lines: list[Any] = []
    for look, (name, summary) in zip(cycle(LOOKS), summaries.items(), strict=False):
        lines += _draw_run(ax, name, summary, look)
    low, high, note = ppl_limits(summaries)
    ax.set(title="Perplexity per token (log scale)", yscale="log", ylim=(low, high))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 14 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(NUMBERS)
    parts = [Line2D([], [], color=GRAY, label=name, **look) for name, look in LINE_STYLES.items()]
    if note:
        parts.append(Line2D([], [], ls="none", label=note))
    longest = max(len(line.get_label()) for line in lines)
    if len(summaries) <= FEW and longest < 55:
        label_ends(ax, lines)
        lines = []
    columns = 2 if longest < 55 else 1
    figure.legend(handles=lines + parts, loc="outside lower center", ncols=columns if lines else 4)
    return figure


def known_epochs(summary: Summary) -> Lines:
    """Return the epochs whose numbers are known; the original did not publish all of them."""
    return [line for line in summary["phase2"]["epochs"] if line["val_ppl"] is not None]


def ppl_limits(summaries: Mapping[str, Summary]) -> tuple[float, float, str]:
    """Return the limits of the perplexity axis, and a note on the values above it.

    The training perplexity of each run's first epoch is ignored, because it would flatten the other curves.
    """
    values: list[float] = []
    for summary in summaries.values():
        epochs = known_epochs(summary)
        values += [line["val_ppl"] for line in epochs] + [line["train_ppl"] for line in epochs[1:]]
        values += [summary["ngrams"]["kneser_ney"]["val_ppl"]] if "ngrams" in summary else []
    low, high = min(values) / 1.2, 1.2 * max(values)
    first = [known_epochs(summary)[0]["train_ppl"] for summary in summaries.values()]
    above = [f"{ppl:,.0f}" for ppl in first if ppl > high]
    listed = f": {', '.join(above)}" if len(above) <= FEW else ""
    return low, high, f"↑ above the axis: training in epoch 1{listed}" if above else ""


def _draw_run(ax: Axes, name: str, summary: Summary, look: Mapping[str, Any]) -> list[Line2D]:
    """Draw the epochs of one run and return the lines that need a label."""
    phase2, epochs, color = summary["phase2"], known_epochs(summary), look["color"]
    at = [line["epoch"] for line in epochs]
    ax.plot(at, [line["train_ppl"] for line in epochs], color=color, **LINE_STYLES["training"])
    best = f"PPL {phase2['val_ppl']:,.1f}, {phase2['val_acc']:.1%} right, epoch {phase2['best_epoch']}"
    label = f"{name}: {best}"
    lines = ax.plot(
        at, [line["val_ppl"] for line in epochs], label=label, **{**LINE_STYLES["validation"], **look}
    )
    if phase2["best_epoch"] in at:
        ax.plot(phase2["best_epoch"], phase2["val_ppl"], color=color, **LINE_STYLES["best epoch"])
    if "ngrams" in summary:
        ppl = summary["ngrams"]["kneser_ney"]["val_ppl"]
        lines.append(ax.axhline(ppl, color=color, ls=":", label=f"{name}: PPL of n-grams {ppl:,.1f}"))
    return lines


def ink(color: Any) -> tuple[float, ...]:
    """Darken a color for text, since some colors of the palette are too faint for letters on white."""
    return tuple(0.65 * channel for channel in to_rgb(color))


def label_ends(ax: Axes, lines: Sequence[Line2D], gap: float = 29) -> None:
    """Label lines at their last values, right of the axes. The caller must set the limits of the axes first.

    The labels are at least `gap` points apart.
    """
    lowest = -float("inf")
    ends: list[tuple[Any, Line2D]] = [([*line.get_ydata()][-1], line) for line in lines]  # type: ignore
    for y, line in sorted(ends, key=itemgetter(0)):
        height = 72 / ax.figure.dpi * ax.transData.transform((0, y))[1]
        lowest = max(height, lowest + gap)
        text = str(line.get_label()).replace(": ", "\n", 1)
        right: Any = ax.get_yaxis_transform()
        shift, color = (5, lowest - height), ink(line.get_color())
        ax.annotate(text, (1, y), shift, right, "offset points", va="center", fontsize=9.5, color=color)


@styled
def phase1_curves(runs: Mapping[str, Lines], stop_rate: float | None = None) -> Picture:
    """Draw the share of converged positions, the loss and the effective rank of Phase 1 by iteration.

    Args:
        runs: `{name: Phase 1 lines of metrics.jsonl}`, as in `run.phase1`.
        stop_rate: share of converged positions at which Phase 1 stops, drawn as a line.
    """
    figure, (rate, loss, rank) = panels(3, 4.2, "Iteration")
    for look, (name, lines) in zip(cycle(LOOKS), runs.items(), strict=False):
        at = [line["iteration"] for line in lines]
        for ax, key, factor in (
            (rate, "convergence_rate", 100),
            (loss, "loss", 1),
            (rank, "effective_rank", 100),
        ):
            ax.plot(at, [factor * line[key] for line in lines], ms=4, label=name, **look)
    if stop_rate is not None:
        rate.axhline(100 * stop_rate, color=GRAY, ls="--", lw=1.2, label=f"stop at {100 * stop_rate:g}%")
    rate.set(title="Converged positions (%)", ylim=(-3, 103))
    loss.set(title="Loss")
    rank.set(title="Effective rank of contexts (%)", ylim=(0, None))
    figure.legend(handles=rate.get_legend_handles_labels()[0], loc="outside lower center", ncols=3)
    return figure


@styled
def loss_curves(runs: Mapping[str, Lines]) -> Picture:
    """Draw the training loss of Phase 2 by step, from `{name: lines of metrics.jsonl that have a step}`."""
    figure, (ax,) = panels(1, 4.2, "Step")
    for look, (name, lines) in zip(cycle(LOOKS), runs.items(), strict=False):
        at = [(line["epoch"] - 1) * line["steps"] + line["step"] for line in lines]
        ax.plot(at, [line["loss"] for line in lines], ms=3, label=name, **look)
    ax.set(title="Training loss in nats per token")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@styled
def memory_by_stage(runs: Mapping[str, Lines]) -> Picture:
    """Draw memory by stage in GiB: a bar and a number show the end of a stage, and a line its peak.

    Args:
        runs: `{name: memory}`, as in `run.summary["memory"]`; each run gets a panel.
    """
    stages = {name: memory_stages(lines) for name, lines in runs.items()}
    names = list(dict.fromkeys(line["stage"] for lines in stages.values() for line in lines))
    figure, axes = panels(len(runs), 1.4 + 0.4 * len(names), sharex=True, sharey=True)
    for ax, (title, lines) in zip(axes, stages.items(), strict=True):
        devices = [name for name in ("cpu", "gpu") if any(line[f"{name}_gib"] is not None for line in lines)]
        for place, (color, device) in enumerate(zip(OKABE_ITO, devices, strict=False)):
            for line in lines:
                y = names.index(line["stage"]) + 0.4 * (place - (len(devices) - 1) / 2)
                memory, peak = line[f"{device}_gib"] or 0.0, line[f"{device}_peak_gib"]
                ax.barh(y, memory, height=0.34, color=color, label=device.upper())
                ax.annotate(f" {memory:.2f}", (max(memory, peak or 0), y), va="center", fontsize="small")
                if peak is not None:
                    ax.plot([memory, peak], [y, y], color=color, lw=1.6, marker="|", markevery=[1], ms=8)
        ax.set(title=title, xlabel="GiB")
        ax.margins(x=0.18)  # room for the numbers
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.4, -0.6)
    handles = {bar.get_label(): bar for ax in axes for bar in ax.containers}
    figure.legend(handles=handles.values(), loc="outside lower center", ncols=2)
    return figure


@styled
def window_attention(slots: Sequence[int], weights: Sequence[float], position: int, title: str) -> Picture:
    """Draw the attention weights of one position by slot, with the oldest slot at the left.

    Slots before the start of the stream are gray.
    """
    figure, (ax,) = panels(1, 3)
    colors = [OKABE_ITO[0] if slot >= 0 else "#b9bec7" for slot in slots]
    ax.bar(range(len(slots)), [100 * weight for weight in weights], color=colors)
    even = 100 / len(slots)
    ax.axhline(even, color=OKABE_ITO[1], lw=1.2, ls="--")
    ax.annotate(
        f" uniform: {even:.1f}%", (1, even), xycoords=("axes fraction", "data"), color=ink(OKABE_ITO[1])
    )
    ticks = range(0, len(slots), -(-len(slots) // 16))
    ax.set_xticks(ticks, [f"{position - slots[place]:,}" for place in ticks])
    ax.set(title=title, xlabel="Tokens back (gray: before the stream)", ylabel="Attention (%)")
    ax.invert_xaxis()  # the oldest slot is at the left
    return figure
