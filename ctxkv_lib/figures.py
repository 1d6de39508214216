"""Static figures of runs and of the architecture.

Every function takes loaded data and returns a matplotlib `Figure` made with the object API: no pyplot, no
global state, no display. Colours are Okabe and Ito's, which colour-blind readers can tell apart; the
background is set, so that a figure reads the same on a dark page.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .diagram import INK, OKABE_ITO, PAPER, QUIET, RULE
from .diagram import architecture as architecture  # one of the figures of this module
from .files import replacing

DPI = 150


def save(figure: Figure, path: Path | str) -> Path:
    """Write `figure` as a PNG, complete or not at all."""
    path = Path(path)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=DPI, facecolor=PAPER, metadata={"Software": None})
    return path


def run_labels(summaries: Iterable[Mapping[str, Any]], unit: str = " samples") -> list[str]:
    """A name for each run: its samples, numbered where several runs have as many."""
    names = [f"{summary['samples']:,}{unit}" for summary in summaries]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def ppl_curves(summaries: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> Figure:
    """Train (dashed) and validation (solid) perplexity by epoch; best epoch and early stop marked.

    Args:
        summaries: contents of `summary.json`, one a run.
        labels: names for the legend; by default the numbers of samples.
    """
    figure, (ax,) = _panels(1, size=(8.4, 4.9))
    labels = run_labels(summaries) if labels is None else labels
    best = []
    for colour, label, summary in zip(_colours(summaries), labels, summaries, strict=True):
        _ppl_run(ax, summary["phase2"], label, colour)
        best.append((summary["phase2"]["best_epoch"], summary["phase2"]["val_ppl"], colour))
    _integer_x(ax, "Epoch (passes over the training tokens)")
    _log_y(ax, "Perplexity per token (log scale)")
    ax.margins(x=0.04, y=0.08)
    ax.set_title("Perplexity by epoch", loc="left", weight="bold")
    runs = [Line2D([], [], color=c, lw=2.2, label=n) for c, n in zip(_colours(labels), labels, strict=True)]
    figure.legend(handles=[*runs, *_ppl_key()], loc="outside right upper", frameon=False)
    _label_points(figure, ax, best)
    return figure


def phase1_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], stop_rate: float = 0.90) -> Figure:
    """Convergence rate (%) and OACD loss by iteration.

    Args:
        runs: `{label: phase 1 lines of metrics.jsonl}`; a line without a value is left out of that curve.
        stop_rate: share of converged positions at which Phase 1 stops.
    """
    figure, (rate, loss) = _panels(2, size=(9.6, 4.1), sharex=True)
    for colour, (label, lines) in zip(_colours(runs), runs.items(), strict=True):
        style: dict[str, Any] = {"color": colour, "label": label, "lw": 2, "marker": "o", "markersize": 3.5}
        rate.plot(*_series(lines, "iteration", "convergence_rate", scale=100), **style)
        loss.plot(*_series(lines, "iteration", "loss"), **style)
    rate.axhline(100 * stop_rate, color=QUIET, ls="--", lw=1.2, label=f"stop at {stop_rate:.0%}")
    rate.set_ylim(-3, 103)
    rate.set_ylabel("Converged positions (%)")
    rate.set_title("Convergence", loc="left", weight="bold")
    loss.set_title("OACD loss", loc="left", weight="bold")
    if all(value > 0 for line in loss.get_lines() for value in _y_values(line)):
        _log_y(loss, "Loss (no unit, log scale)")
    else:
        loss.set_ylabel("Loss (no unit)")
    for ax in (rate, loss):
        _integer_x(ax, "Iteration (one optimiser step each)")
    figure.legend(*rate.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def memory_by_stage(
    summaries: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None, gpu: bool = True
) -> Figure:
    """CPU and GPU memory (GiB) by stage, one panel a run: a bar for now, a line on to the peak so far.

    Args:
        summaries: contents of `summary.json`, one a run.
        labels: titles of the panels; by default the numbers of samples.
        gpu: False leaves the GPU out even where it was measured.
    """
    stages = [memory_stages(summary["memory"]) for summary in summaries]
    with_gpu = gpu and any(stage["gpu_gib"] is not None for run in stages for stage in run)
    devices = ["cpu", "gpu"] if with_gpu else ["cpu"]
    columns = min(3, len(summaries))
    rows = -(-len(summaries) // columns)
    height = 1.2 + rows * (0.6 + 0.4 * max(map(len, stages)))
    figure, axes = _panels(len(summaries), size=(3.4 + 2.9 * columns, height), rows=rows, sharex=True)
    labels = run_labels(summaries) if labels is None else labels
    for i, (ax, label, run) in enumerate(zip(axes, labels, stages, strict=True)):
        _memory_run(ax, run, devices, names=i % columns == 0)
        ax.set_title(label, loc="left", weight="bold")
        ax.set_xlabel("Memory (GiB)")
    figure.legend(handles=_memory_key(devices), loc="outside lower center", ncols=4, frameon=False)
    return figure


def memory_stages(memory: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The stages of a run with its epochs cut down to the first and the last, named so."""
    epochs = [stage for stage in memory if stage["stage"].startswith("epoch ")]
    kept = [dict(stage) for stage in memory if stage not in epochs]
    if epochs:
        kept.append({**epochs[0], "stage": "first epoch"})
    if len(epochs) > 1:
        kept.append({**epochs[-1], "stage": "last epoch"})
    return kept


def _ppl_run(ax: Axes, phase2: Mapping[str, Any], label: str, colour: str) -> None:
    epochs = phase2["epochs"]
    ax.plot(*_series(epochs, "epoch", "train_ppl"), color=colour, ls="--", lw=1.4, label=f"{label}: train")
    x, y = _series(epochs, "epoch", "val_ppl")
    ax.plot(x, y, color=colour, lw=2.2, marker="o", markersize=3.5, label=f"{label}: validation")
    best = ([phase2["best_epoch"]], [phase2["val_ppl"]])
    ring: dict[str, Any] = {"marker": "o", "markersize": 10, "mfc": PAPER, "mew": 2.2, "ls": "none"}
    ax.plot(*best, color=colour, zorder=4, label=f"{label}: best epoch", **ring)
    if phase2["stop_reason"] == "early_stopping" and epochs[-1]["val_ppl"] is not None:
        cross: dict[str, Any] = {"marker": "X", "markersize": 9, "mec": PAPER, "ls": "none"}
        ax.plot(x[-1:], y[-1:], color=colour, zorder=5, label=f"{label}: early stop", **cross)


def _ppl_key() -> list[Line2D]:
    plain: dict[str, Any] = {"color": QUIET}
    return [
        Line2D([], [], ls="none", label=" "),  # a gap between the runs and the key
        Line2D([], [], **plain, lw=2.2, label="validation"),
        Line2D([], [], **plain, lw=1.4, ls="--", label="train"),
        Line2D([], [], **plain, ls="none", marker="o", ms=9, mfc=PAPER, mew=2, label="best epoch, its PPL"),
        Line2D([], [], **plain, ls="none", marker="X", ms=9, mec=PAPER, label="early stop"),
    ]


def _label_points(figure: Figure, ax: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each point's value under it, pushed down where it would touch another label."""
    figure.draw_without_rendering()  # from here on, places on the page are final
    height, width, placed = 16.0, 46.0, list[tuple[float, float]]()
    scale = 72 / figure.dpi
    for x, y, colour in sorted(points, key=lambda point: -point[1]):
        px, py = ax.transData.transform((x, y)) * scale
        text_y = py - 15
        for qx, qy in placed:
            if abs(qx - px) < width and text_y > qy - height:
                text_y = qy - height
        placed.append((px, text_y))
        note = ax.annotate(
            f"{y:,.1f}", (x, y), (0, text_y - py), textcoords="offset points", color=colour, zorder=6
        )
        note.set(ha="center", va="center", weight="bold")
        note.set_path_effects([effects.withStroke(linewidth=3, foreground=PAPER)])


def _memory_run(ax: Axes, stages: Sequence[Mapping[str, Any]], devices: Sequence[str], names: bool) -> None:
    thick = 0.8 / len(devices)
    for slot, device in enumerate(devices):
        y = [i + (slot - (len(devices) - 1) / 2) * thick for i in range(len(stages))]
        now = [stage[f"{device}_gib"] or 0.0 for stage in stages]
        peak = [stage[f"{device}_peak_gib"] or value for stage, value in zip(stages, now, strict=True)]
        colour = OKABE_ITO[slot]
        ax.barh(y, now, height=thick * 0.86, color=colour, label=f"{device.upper()} now")
        ax.hlines(y, now, peak, color=colour, lw=1.6)
        ax.plot(peak, y, ls="none", marker="|", ms=8, mew=2, color=colour, label=f"{device.upper()} peak")
    ax.set_yticks(range(len(stages)), [stage["stage"] for stage in stages] if names else [""] * len(stages))
    ax.set_ylim(len(stages) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.tick_params(labelbottom=True)
    if names:
        ax.set_ylabel("Stage (epochs: first and last)")
    ax.grid(False, axis="y")


def _memory_key(devices: Sequence[str]) -> list[Any]:
    key: list[Any] = []
    for colour, device in zip(OKABE_ITO, devices, strict=False):
        key.append(Patch(color=colour, label=f"{device.upper()} now"))
        key.append(
            Line2D([], [], color=colour, marker="|", ms=9, mew=2, label=f"{device.upper()} peak so far")
        )
    return key


def _panels(
    count: int, size: tuple[float, float], rows: int = 1, sharex: bool = False
) -> tuple[Figure, list]:
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


def _colours(runs: Iterable[Any]) -> list[str]:
    return [OKABE_ITO[i % len(OKABE_ITO)] for i, _ in enumerate(runs)]


def _series(
    lines: Sequence[Mapping[str, Any]], x: str, y: str, scale: float = 1.0
) -> tuple[list[float], list[float]]:
    known = [line for line in lines if line.get(y) is not None]
    return [line[x] for line in known], [scale * line[y] for line in known]


def _y_values(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_ydata())]


def _integer_x(ax: Axes, label: str) -> None:
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _log_y(ax: Axes, label: str) -> None:
    ax.set_yscale("log")
    ax.set_ylabel(label)
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
