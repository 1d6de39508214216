"""Figures of runs: each function returns a matplotlib Figure, which a cell shows if it ends with it.

Colours are Okabe and Ito's palette, which colour-blind readers can distinguish. Figures are made without
pyplot, so that none is shown twice, and are white, so that they look the same on a dark page.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..files import replacing
from ..report.tables import Summary, memory_stages

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#6b7280"
NUMBERS = "{x:,.10g}"  # on axes
WIDTH = 9.6  # inches
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=OKABE_ITO),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "font.size": 11,
    "grid.color": "#e3e6eb",
    "legend.frameon": False,
}
# A decorator of functions that draw, whatever the user's style is; names of runs may hold dollar signs.
styled = style.context(["default", STYLE, {"text.parse_math": False}])
# Parts of a run, drawn in its colour; the legend explains each in grey.
PARTS: dict[str, dict[str, Any]] = {
    "training": {"ls": "--", "lw": 1.4},
    "validation": {"marker": "o", "ms": 4},
    "best epoch": {"ls": "none", "marker": "o", "ms": 10, "mfc": "none", "mew": 2},
}
Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl


class Picture(Figure):
    """A figure that a notebook shows, also where pyplot has not been imported."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", facecolor="white")
        return content.getvalue()


def panels(count: int, height: float, counted: str = "", **share: Any) -> tuple[Picture, list[Axes]]:
    """Make a figure of `count` axes in a row, `height` in inches; `share` as in `Figure.subplots`.

    `counted` is what an x axis of whole numbers counts.
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
def save(figure: Figure, path: Path) -> Path:
    """Write `figure` as a PNG, complete or not at all."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return path


@styled
def ppl_curves(
    summaries: Mapping[str, Summary],
    log: bool = True,
    accuracy: bool = False,
    last: int | None = None,
    epoch: int | None = None,
) -> Picture:
    """Draw training and validation perplexity by epoch, with a ring at the best epoch.

    Args:
        summaries: contents of `summary.json` by name. Where n-grams were measured, a dotted line is theirs.
        log: perplexity on a log scale.
        accuracy: draw validation accuracy in a second panel.
        last: the last epoch to draw; None draws all.
        epoch: an epoch to mark with a line.
    """
    figure, axes = panels(1 + accuracy, 4.2 + 0.13 * len(summaries), "Epoch")
    shown: list[float] = []  # all perplexities but the first of training, which would flatten the rest
    for colour, (name, summary) in zip(cycle(OKABE_ITO), summaries.items(), strict=False):
        epochs = [line for line in summary["phase2"]["epochs"][:last] if line["val_ppl"] is not None]
        _draw_run(axes, name, summary, epochs, colour)
        shown += [line["val_ppl"] for line in epochs] + [line["train_ppl"] for line in epochs[1:]]
        shown += [summary["ngrams"]["kneser_ney"]["val_ppl"]] if "ngrams" in summary else []
    for ax, title in zip(axes, ("Perplexity per token", "Validation accuracy (%)"), strict=False):
        ax.set_title(title)
        if epoch is not None:
            ax.axvline(epoch, color=GREY, lw=1)
    low, high = min(shown), max(shown)
    axes[0].set_ylim(low / 1.2 if log else 0, 1.2 * high)
    if log:
        axes[0].set_yscale("log")
        subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)
        axes[0].yaxis.set_major_locator(LogLocator(subs=subs))
        axes[0].yaxis.set_minor_formatter(NullFormatter())
        axes[0].yaxis.set_major_formatter(NUMBERS)
    handles: list[Any] = axes[0].get_legend_handles_labels()[0]
    handles += [Line2D([], [], color=GREY, label=name, **look) for name, look in PARTS.items()]
    longest = max(len(handle.get_label()) for handle in handles)
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if longest < 55 else 1)
    return figure


def _draw_run(axes: Sequence[Axes], name: str, summary: Summary, epochs: Lines, colour: str) -> None:
    """Draw the epochs of one run: perplexity and, where there are two axes, accuracy."""
    phase2, at = summary["phase2"], [line["epoch"] for line in epochs]
    label = f"{name}: PPL {phase2['val_ppl']:,.1f}, {phase2['val_acc']:.1%}, epoch {phase2['best_epoch']}"
    axes[0].plot(at, [line["train_ppl"] for line in epochs], color=colour, **PARTS["training"])
    for ax, key, factor in zip(axes, ("val_ppl", "val_acc"), (1, 100), strict=False):
        values = [factor * line[key] for line in epochs]
        ax.plot(at, values, color=colour, label=label, **PARTS["validation"])
        if phase2["best_epoch"] in at:
            ax.plot(phase2["best_epoch"], factor * phase2[key], color=colour, **PARTS["best epoch"])
    if "ngrams" in summary:
        ngrams = summary["ngrams"]["kneser_ney"]["val_ppl"]
        axes[0].axhline(ngrams, color=colour, ls=":", label=f"{name}: PPL of n-grams {ngrams:,.1f}")


@styled
def phase1_curves(runs: Mapping[str, Lines], stop_rate: float | None = None) -> Picture:
    """Draw the share of converged positions and the loss of Phase 1 by iteration.

    Args:
        runs: `{name: Phase 1 lines of metrics.jsonl}`, as in `run.phase1`.
        stop_rate: share of converged positions at which Phase 1 stops, drawn as a line.
    """
    figure, (rate, loss) = panels(2, 4.2, "Iteration")
    for colour, (name, lines) in zip(cycle(OKABE_ITO), runs.items(), strict=False):
        at = [line["iteration"] for line in lines]
        for ax, key, factor in ((rate, "convergence_rate", 100), (loss, "loss", 1)):
            ax.plot(at, [factor * line[key] for line in lines], "-o", ms=4, color=colour, label=name)
    if stop_rate is not None:
        rate.axhline(100 * stop_rate, color=GREY, ls="--", lw=1.2, label=f"stop at {100 * stop_rate:g}%")
    rate.set(title="Converged positions (%)", ylim=(-3, 103))
    loss.set(title="Loss")
    figure.legend(handles=rate.get_legend_handles_labels()[0], loc="outside lower center", ncols=3)
    return figure


@styled
def memory_by_stage(runs: Mapping[str, Lines]) -> Picture:
    """Draw memory by stage in GiB: a bar for what is held at its end, a line to the most during it.

    Args:
        runs: `{name: memory}`, as in `run.summary["memory"]`; a panel for each.
    """
    stages = {name: memory_stages(lines) for name, lines in runs.items()}
    names = list(dict.fromkeys(line["stage"] for lines in stages.values() for line in lines))
    figure, axes = panels(len(runs), 1.4 + 0.4 * len(names), sharex=True, sharey=True)
    for ax, (title, lines) in zip(axes, stages.items(), strict=True):
        devices = [name for name in ("cpu", "gpu") if any(line[f"{name}_gib"] is not None for line in lines)]
        for place, (colour, device) in enumerate(zip(OKABE_ITO, devices, strict=False)):
            for line in lines:
                y = names.index(line["stage"]) + 0.4 * (place - (len(devices) - 1) / 2)
                held, peak = line[f"{device}_gib"] or 0.0, line[f"{device}_peak_gib"]
                ax.barh(y, held, height=0.34, color=colour, label=device.upper())
                if peak is not None:
                    ax.plot([held, peak], [y, y], color=colour, lw=1.6, marker="|", markevery=[1], ms=8)
        ax.set(title=title, xlabel="GiB")
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.4, -0.6)
    handles = {bar.get_label(): bar for ax in axes for bar in ax.containers}
    figure.legend(handles=handles.values(), loc="outside lower center", ncols=2)
    return figure


@styled
def window_attention(slots: Sequence[int], weights: Sequence[float], position: int, title: str) -> Picture:
    """Draw the attention weights of one position by slot; slots before the stream are grey."""
    figure, (ax,) = panels(1, 3)
    colours = [OKABE_ITO[0] if slot >= 0 else "#b9bec7" for slot in slots]
    ax.bar(range(len(slots)), [100 * weight for weight in weights], color=colours)
    named = range(0, len(slots), -(-len(slots) // 16))
    ax.set_xticks(named, [f"{position - slots[place]:,}" for place in named])
    ax.set(title=title, xlabel="Tokens back (grey: before the stream)", ylabel="Attention (%)")
    return figure
