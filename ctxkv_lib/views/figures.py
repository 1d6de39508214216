"""Static figures of runs.

Every function takes loaded data and returns a matplotlib `Figure` made with the object API: no pyplot, no
global state, no display. What they look like alike is in `axes`.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .axes import INK, OKABE_ITO, PAPER, QUIET, colours, integer_x, legend_below, log_y, panels, plain

CURVES = ("train", "validation", "accuracy")  # of an epoch: two perplexities, and the validation accuracy


def run_labels(
    summaries: Iterable[Mapping[str, Any]], unit: str = " samples", others: Sequence[str] = ()
) -> list[str]:
    """A name for each run: its samples; where several have as many, its one of `others`, and a number."""
    names = [f"{summary['samples']:,}{unit}" for summary in summaries]
    if len(set(names)) < len(names):
        names = [", ".join(filter(None, pair)) for pair in zip_longest(names, others)]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def ppl_curves(
    summaries: Sequence[Mapping[str, Any]],
    labels: Sequence[str] | None = None,
    curves: Sequence[str] = CURVES[:2],
    log: bool = True,
    epochs: tuple[int, int] | None = None,
    palette: Sequence[str] | None = None,
    epoch: int | None = None,
) -> Figure:
    """Train (dashed) and validation (solid) perplexity by epoch; best epoch and early stop marked.

    A dotted line is the validation perplexity of n-grams counted on the same tokens, where it was measured.

    Values stand in the legend, where no curve passes.

    Args:
        summaries: contents of `summary.json`, one a run.
        labels: names for the legend; by default the numbers of samples.
        curves: which of `CURVES` to draw; accuracy gets a panel of its own.
        log: perplexity on a log scale.
        epochs: the first and the last epoch to draw; None draws all.
        palette: a colour for each run.
        epoch: an epoch to mark with a line.
    """
    on_ppl = [curve for curve in CURVES[:2] if curve in curves]
    count = (not curves or bool(on_ppl)) + ("accuracy" in curves)
    figure, axes = panels(count, size=(9.6, 4.6) if count == 1 else (12, 4.6))
    labels = run_labels(summaries) if labels is None else labels
    palette = colours(summaries) if palette is None else palette
    runs = [{**_shown_epochs(run["phase2"], epochs), "counted": _counted(run)} for run in summaries]
    if "accuracy" in curves:
        for colour, label, phase2 in zip(palette, labels, runs, strict=True):
            _accuracy_run(axes[-1], phase2, label, colour)
        _epoch_axis(axes[-1], "Validation accuracy by epoch", "Right next token (% of positions)")
    if on_ppl or not curves:
        for colour, label, phase2 in zip(palette, labels, runs, strict=True):
            _ppl_run(axes[0], phase2, label, colour, on_ppl)
        _epoch_axis(axes[0], "Perplexity by epoch", "Perplexity per token")
        if log:
            log_y(axes[0], "Perplexity per token (log scale)")
    if epoch is not None:
        for ax in axes:
            ax.axvline(epoch, color=QUIET, ls=":", lw=1.6, zorder=0, label=f"epoch {epoch}")
    names = [
        Line2D([], [], color=colour, lw=2.2, label=plain(label) + _best(phase2, curves))
        for colour, label, phase2 in zip(palette, labels, runs, strict=True)
    ]
    drawn = [str(line.get_label()) for ax in axes for line in ax.get_lines()]
    key = _ppl_key(curves, *(any(name.endswith(end) for name in drawn) for end in ("early stop", "n-grams")))
    figure.legend(handles=[*names, *key], loc="outside right upper", frameon=False)
    return figure


def phase1_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], stop_rate: float = 0.90) -> Figure:
    """Convergence rate (%) and OACD loss by iteration.

    Args:
        runs: `{label: phase 1 lines of metrics.jsonl}`; a line without a value is left out of that curve.
        stop_rate: share of converged positions at which Phase 1 stops.
    """
    figure, (rate, loss) = panels(2, size=(9.6, 4.6), sharex=True)
    for colour, (label, lines) in zip(colours(runs), runs.items(), strict=True):
        style: dict[str, Any] = {
            "color": colour,
            "label": plain(label),
            "lw": 2,
            "marker": "o",
            "markersize": 3.5,
        }
        rate.plot(*_series(lines, "iteration", "convergence_rate", scale=100), **style)
        loss.plot(*_series(lines, "iteration", "loss"), **style)
    rate.axhline(100 * stop_rate, color=QUIET, ls="--", lw=1.2, label=f"stop at {stop_rate:.0%}")
    rate.set_ylim(-3, 103)
    rate.set_ylabel("Converged positions (%)")
    rate.set_title("Convergence", loc="left", weight="bold")
    loss.set_title("OACD loss", loc="left", weight="bold")
    if all(value > 0 for line in loss.get_lines() for value in _y_values(line)):
        log_y(loss, "Loss (no unit, log scale)")
    else:
        loss.set_ylabel("Loss (no unit)")
    for ax in (rate, loss):
        integer_x(ax, "Iteration (one optimiser step each)")
    legend_below(figure, rate)
    return figure


def memory_by_stage(summaries: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> Figure:
    """Memory (GiB) by stage, one panel a run: a bar for now, a line on to the peak so far.

    The GPU has bars in the panels of runs that used one.

    Args:
        summaries: contents of `summary.json`, one a run.
        labels: titles of the panels; by default the numbers of samples.
    """
    stages = [memory_stages(summary["memory"]) for summary in summaries]
    used = [["cpu", "gpu"] if run[-1]["gpu_gib"] is not None else ["cpu"] for run in stages]
    columns = min(3, len(summaries))
    rows = -(-len(summaries) // columns)
    names = list(dict.fromkeys(stage["stage"] for run in stages for stage in run))
    height = 1.2 + rows * (0.6 + 0.4 * len(names))
    figure, axes = panels(len(summaries), size=(3.4 + 2.9 * columns, height), rows=rows, sharex=True)
    labels = run_labels(summaries) if labels is None else labels
    for i, (ax, label, run, devices) in enumerate(zip(axes, labels, stages, used, strict=True)):
        _memory_run(ax, run, devices, names, named=i % columns == 0)
        ax.set_title(plain(label), loc="left", weight="bold")
        ax.set_xlabel("Memory (GiB)")
    axes[0].set_xlim(0, 1.05 * max(max(ax.dataLim.xmax for ax in axes), 0.1))  # all panels share it
    figure.legend(handles=_memory_key(max(used, key=len)), loc="outside lower center", ncols=4, frameon=False)
    return figure


def ppl_by_reading(scores: Mapping[str, Any]) -> Figure:
    """Perplexity by how much of a conversation was read, and by how many contexts attention saw.

    Args:
        scores: as from `inference.evaluate_texts`.
    """
    figure, axes = panels(2, size=(10.5, 4.6))
    names = {
        "by_position": ("By place in the conversation", "Tokens of the conversation read before"),
        "by_history": ("By history", "Contexts in the window"),
    }
    for ax, (key, (title, what)) in zip(axes, names.items(), strict=True):
        ppls = [row["ppl"] for row in scores[key]]
        ax.bar([span(row) for row in scores[key]], ppls, color=OKABE_ITO[0], width=0.7)
        for x, value in enumerate(ppls):  # above the axes, where the line of all tokens does not pass
            ax.text(x, 1.02, f"{value:,.0f}", transform=ax.get_xaxis_transform(), ha="center", color=INK)
        ax.axhline(scores["ppl"], color=QUIET, linestyle="--", label=f"all tokens: {scores['ppl']:,.0f}")
        ax.set_ylim(min(ppls) / 2, 1.1 * max(ppls))
        log_y(ax, "Perplexity per token (log scale)")
        ax.set_xlabel(what)
        ax.set_title(title, loc="left", weight="bold", pad=22)
        ax.tick_params(axis="x", labelrotation=30)
    legend_below(figure, axes[0])
    return figure


def span(row: Mapping[str, Any]) -> str:
    """The values of a bin: 0, 1–9, 640+."""
    if row["to"] is None:
        return f"{row['from']:,}+"
    return f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,}–{row['to']:,}"


def memory_stages(memory: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The stages of a run with its epochs cut down to the first and the last, named so."""
    epochs = [stage for stage in memory if stage["stage"].startswith("epoch ")]
    kept = [dict(stage) for stage in memory if stage not in epochs]
    if epochs:
        kept.append({**epochs[0], "stage": "first epoch"})
    if len(epochs) > 1:
        kept.append({**epochs[-1], "stage": "last epoch"})
    return kept


def _shown_epochs(phase2: Mapping[str, Any], epochs: tuple[int, int] | None) -> Mapping[str, Any]:
    """A run's Phase 2 with the epochs of the range only, and `stopped_at`: the epoch of an early stop."""
    final = phase2["epochs"][-1]["epoch"]
    first, last = epochs or (0, final)
    shown = [line for line in phase2["epochs"] if first <= line["epoch"] <= last]
    stopped = final if phase2["stop_reason"] == "early_stopping" else None
    return {**phase2, "epochs": shown, "stopped_at": stopped}


def _counted(summary: Mapping[str, Any]) -> float | None:
    """Validation perplexity of n-grams counted on the run's tokens, if that was measured."""
    return summary["ngrams"]["kneser_ney"]["val_ppl"] if "ngrams" in summary else None


def _best(phase2: Mapping[str, Any], curves: Sequence[str]) -> str:
    """The best epoch's values as a line of text, as far as their curves are drawn."""
    values = {"validation": f"PPL {phase2['val_ppl']:,.1f}", "accuracy": f"{phase2['val_acc']:.1%} right"}
    drawn = [text for curve, text in values.items() if curve in curves]
    return f"\nepoch {phase2['best_epoch']}: {', '.join(drawn)}" if drawn else ""


def _epoch_axis(ax: Axes, title: str, unit: str) -> None:
    integer_x(ax, "Epoch (passes over the training tokens)")
    ax.set_ylabel(unit)
    ax.margins(x=0.04, y=0.08)
    ax.set_title(title, loc="left", weight="bold")


def _ppl_run(ax: Axes, phase2: Mapping[str, Any], label: str, colour: str, curves: Sequence[str]) -> None:
    epochs = phase2["epochs"]
    if "train" in curves:
        x, y = _series(epochs, "epoch", "train_ppl")
        ax.plot(x, y, color=colour, ls="--", lw=1.4, label=f"{label}: train")
    if "validation" in curves:
        x, y = _series(epochs, "epoch", "val_ppl")
        ax.plot(x, y, color=colour, lw=2.2, marker="o", markersize=3.5, label=f"{label}: validation")
        _mark_epochs(ax, phase2, x, y, label, colour)
        if phase2["counted"]:
            ax.axhline(phase2["counted"], color=colour, ls=":", lw=1.6, label=f"{label}: n-grams")


def _accuracy_run(ax: Axes, phase2: Mapping[str, Any], label: str, colour: str) -> None:
    x, y = _series(phase2["epochs"], "epoch", "val_acc", scale=100)
    ax.plot(x, y, color=colour, lw=2.2, marker="o", markersize=3.5, label=f"{label}: accuracy")
    _mark_epochs(ax, phase2, x, y, label, colour)


def _mark_epochs(
    ax: Axes, phase2: Mapping[str, Any], x: Sequence[float], y: Sequence[float], label: str, colour: str
) -> None:
    """A ring around the best epoch and a cross on an early stop, where they are among `x`."""
    if phase2["best_epoch"] in x:
        ring: dict[str, Any] = {"marker": "o", "markersize": 10, "mfc": PAPER, "mew": 2.2, "ls": "none"}
        best = ([phase2["best_epoch"]], [y[x.index(phase2["best_epoch"])]])
        ax.plot(*best, color=colour, zorder=4, label=f"{label}: best epoch", **ring)
    if phase2["stopped_at"] in x:
        cross: dict[str, Any] = {"marker": "X", "markersize": 9, "mec": PAPER, "ls": "none"}
        ax.plot(x[-1:], y[-1:], color=colour, zorder=5, label=f"{label}: early stop", **cross)


def _ppl_key(curves: Sequence[str], stopped: bool, counted: bool) -> list[Line2D]:
    grey: dict[str, Any] = {"color": QUIET}
    ring: dict[str, Any] = {**grey, "ls": "none", "marker": "o", "ms": 9, "mfc": PAPER, "mew": 2}
    validated = [
        Line2D([], [], **grey, lw=2.2, label="validation"),
        Line2D([], [], **ring, label="best epoch: lowest\nvalidation PPL"),
    ]
    cross = Line2D([], [], **grey, ls="none", marker="X", ms=9, mec=PAPER, label="early stop")
    return [
        Line2D([], [], ls="none", label=" "),  # a gap between the runs and the key
        *([Line2D([], [], **grey, lw=1.4, ls="--", label="train")] if "train" in curves else []),
        *(validated if {*curves} - {"train"} else []),
        *([cross] if stopped else []),
        *([Line2D([], [], **grey, lw=1.6, ls=":", label="n-grams, validation")] if counted else []),
    ]


def _memory_run(
    ax: Axes, stages: Sequence[Mapping[str, Any]], devices: Sequence[str], names: Sequence[str], named: bool
) -> None:
    """One run's bars, each in the row of its stage in `names`, which all panels share."""
    thick = 0.4
    for slot, device in enumerate(devices):
        offset = (slot - (len(devices) - 1) / 2) * thick
        y = [names.index(stage["stage"]) + offset for stage in stages]
        now = [stage[f"{device}_gib"] or 0.0 for stage in stages]
        peak = [stage[f"{device}_peak_gib"] or value for stage, value in zip(stages, now, strict=True)]
        colour = OKABE_ITO[slot]
        ax.barh(y, now, height=thick * 0.86, color=colour, label=f"{device.upper()} now")
        ax.hlines(y, now, peak, color=colour, lw=1.6)
        ax.plot(peak, y, ls="none", marker="|", ms=8, mew=2, color=colour, label=f"{device.upper()} peak")
    ax.set_yticks(range(len(names)), names if named else [""] * len(names))
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(labelbottom=True)
    if named:
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


def _series(
    lines: Sequence[Mapping[str, Any]], x: str, y: str, scale: float = 1.0
) -> tuple[list[float], list[float]]:
    known = [line for line in lines if line.get(y) is not None]
    return [line[x] for line in known], [scale * line[y] for line in known]


def _y_values(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_ydata())]
