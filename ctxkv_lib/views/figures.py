"""Figures of runs, from their summaries and metrics."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..errors import UserError
from ..report.labels import memory_stages, run_labels, span
from ..report.tables import digits
from .axes import (
    BLUE,
    INK,
    OKABE_ITO,
    ORANGE,
    PAPER,
    QUIET,
    integer_x,
    legend_below,
    log_y,
    named_rows,
    panels,
    reference,
    styled,
    wrapped,
)

# The curves of an epoch's measurements: their key in a summary, and a factor.
CURVES = {"train": ("train_ppl", 1), "validation": ("val_ppl", 1), "accuracy": ("val_acc", 100)}
# Parts of a run, drawn in its colour and named `run: part`; the legend shows each part in grey.
PARTS: dict[str, dict[str, Any]] = {
    "train": {"ls": "--", "lw": 1.4, "marker": "o"},
    "validation": {"marker": "o"},
    "accuracy": {"marker": "o"},
    "best epoch": {"ls": "none", "marker": "o", "ms": 10, "mfc": PAPER, "mew": 2.2, "zorder": 4},
    "early stop": {"ls": "none", "marker": "X", "ms": 9, "mec": PAPER, "zorder": 5},
    "above the axis": {"ls": "none", "marker": "^", "ms": 9, "clip_on": False},
    "n-grams": {"ls": ":", "lw": 1.6},
}
EXPLAINED = {
    "best epoch": "best epoch: lowest\nvalidation PPL",
    "n-grams": "n-grams, validation",
    "above the axis": "first train PPL\nabove the axis",
}
LINE, LINES_OF_AN_ENTRY = 0.19, 1.4  # inches of a line of a legend; of an entry, with the gap after it
EPOCH = "Epoch (passes over the training tokens)"
CROPPED = 1.5  # times all other values: where the axis ends if the first train PPL lies beyond

Lines = Sequence[Mapping[str, Any]]  # epochs, iterations or stages


@styled
def ppl_curves(
    summaries: Sequence[Mapping[str, Any]],
    labels: Sequence[str] | None = None,
    curves: Sequence[str] = ("train", "validation"),
    log: bool = True,
    epochs: tuple[int, int] | None = None,
    palette: Sequence[str] = OKABE_ITO,
    epoch: int | None = None,
) -> Figure:
    """Draw train and validation perplexity by epoch, with the best epoch and an early stop marked.

    A dotted line is the validation perplexity of n-grams counted on the same tokens, if measured. Values are
    in the legend.

    Args:
        summaries: contents of `summary.json`, one a run.
        labels: names for the legend; by default the numbers of samples.
        curves: which of `CURVES` to draw, at least one; accuracy gets a panel of its own.
        log: perplexity on a log scale.
        epochs: the first and the last epoch to draw; None draws all.
        palette: a colour for each run, used again for more runs.
        epoch: an epoch to mark with a line.

    Raises:
        UserError: no runs, not as many labels, or a curve that is not one of `CURVES`.
    """
    if not curves or {*curves} - {*CURVES}:
        raise UserError(f"curves is {curves!r}; allowed: at least one of {', '.join(CURVES)}, in a list.")
    summaries = [*summaries]
    labels = run_labels(summaries) if labels is None else [*labels]
    if not 0 < len(summaries) == len(labels):
        raise UserError(f"summaries has {len(summaries)} and labels {len(labels)}; give one of each a run.")
    ppls = [curve for curve in ("train", "validation") if curve in curves]
    groups = [group for group in (ppls, [*set(curves) - {*ppls}]) if group]
    figure, axes = panels(len(groups), 1.6 + 3 * len(groups), rows=len(groups))
    runs = [*zip(labels, summaries, cycle(palette), strict=False)]
    for ax, group in zip(axes, groups, strict=True):
        for label, summary, colour in runs:
            _draw_run(ax, summary, group, epochs, label, colour)
        _label_epochs(ax, group == ppls, log)
    names = [
        Line2D([], [], color=colour, label=wrapped(label) + _best(summary["phase2"], curves))
        for label, summary, colour in runs
    ]
    chosen = [] if epoch is None else [reference(ax.axvline, epoch, f"epoch {epoch}", ls="-") for ax in axes]
    handles = [*names, *_key(axes), *chosen[:1]]
    lines = sum(str(each.get_label()).count("\n") + LINES_OF_AN_ENTRY for each in handles)
    figure.set_figheight(max(figure.get_figheight(), LINE * lines))  # else a long legend is cut off
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def _draw_run(
    ax: Axes,
    summary: Mapping[str, Any],
    curves: Sequence[str],
    epochs: tuple[int, int] | None,
    label: str,
    colour: str,
) -> None:
    """Draw some curves of a run, with marks on the last one that is not the training curve."""
    phase2 = summary["phase2"]
    last = phase2["epochs"][-1]["epoch"]
    first, final = epochs or (0, last)
    shown = [line for line in phase2["epochs"] if first <= line["epoch"] <= final]
    for curve in curves:
        column, factor = CURVES[curve]
        x, y = _series(shown, "epoch", column, factor)
        ax.plot(x, y, color=colour, label=f"{label}: {curve}", **PARTS[curve])
    if curves[-1] == "train":
        return
    stop = last if phase2["stop_reason"] == "early_stopping" else None
    for mark, epoch in {"best epoch": phase2["best_epoch"], "early stop": stop}.items():
        if epoch in x:
            ax.plot(epoch, y[x.index(epoch)], color=colour, label=f"{label}: {mark}", **PARTS[mark])
    if "validation" in curves and "ngrams" in summary:
        counted = summary["ngrams"]["kneser_ney"]["val_ppl"]
        ax.axhline(counted, color=colour, label=f"{label}: n-grams", **PARTS["n-grams"])


def _best(phase2: Mapping[str, Any], curves: Sequence[str]) -> str:
    """Format the best epoch's values of all curves that are drawn."""
    values = {"validation": f"PPL {phase2['val_ppl']:,.1f}", "accuracy": f"{phase2['val_acc']:.1%} right"}
    drawn = [text for curve, text in values.items() if curve in curves]
    return f"\nepoch {phase2['best_epoch']}: {', '.join(drawn)}" if drawn else ""


def _label_epochs(ax: Axes, is_ppl: bool, log: bool) -> None:
    integer_x(ax, EPOCH)
    ax.margins(x=0.04, y=0.08)
    if not is_ppl:
        ax.set(title="Validation accuracy by epoch", ylabel="Right next token (% of positions)")
        return
    ax.set(title="Perplexity by epoch", ylabel="Perplexity per token")
    _crop_first_train(ax)
    if log:
        log_y(ax, "Perplexity per token (log scale)")


def _crop_first_train(ax: Axes) -> None:
    """End the axis below a first train PPL that would flatten the curves; draw it as a triangle."""
    points = {line: np.asarray(line.get_xydata()) for line in ax.get_lines()}
    trains = [line for line, at in points.items() if str(line.get_label()).endswith(": train") and len(at)]
    others = np.concatenate([at[line in trains :, 1] for line, at in points.items()])
    for line in trains:
        x, y = points[line][0]
        if len(others) and y > CROPPED * others.max():
            part, colour = "above the axis", line.get_color()
            label = str(line.get_label()).replace(": train", f": {part}")
            ax.plot(x, 0.97, color=colour, transform=ax.get_xaxis_transform(), label=label, **PARTS[part])
            ax.set_ylim(0.9 * others.min(), CROPPED * others.max())


def _key(axes: Sequence[Axes]) -> list[Line2D]:
    """Return legend entries of the drawn parts, in grey, after a gap."""
    drawn = {str(line.get_label()).rpartition(": ")[2] for ax in axes for line in ax.get_lines()}
    parts = [
        Line2D([], [], color=QUIET, label=EXPLAINED.get(part, part), **style)
        for part, style in PARTS.items()
        if part in drawn
    ]
    return [Line2D([], [], ls="none", label=" "), *parts]


@styled
def phase1_curves(runs: Mapping[str, Lines], stop_rate: float) -> Figure:
    """Draw convergence rate (%) and the loss by iteration: OACD, or that of a plug-in.

    Args:
        runs: `{label: phase 1 lines of metrics.jsonl}`; a line without a value is left out of that curve.
        stop_rate: share of converged positions at which Phase 1 stops.
    """
    figure, (rate, loss) = panels(2, 4.6, sharex=True)
    for label, lines in runs.items():
        rate.plot(*_series(lines, "iteration", "convergence_rate", 100), marker="o", label=label)
        loss.plot(*_series(lines, "iteration", "loss"), marker="o", label=label)
    reference(rate.axhline, 100 * stop_rate, f"stop at {digits(100 * stop_rate)}%")
    rate.set(title="Convergence", ylabel="Converged positions (%)", ylim=(-3, 103))
    loss.set(title="Phase 1 loss", ylabel="Loss (no unit)")
    if any(runs.values()) and all(line["loss"] > 0 for lines in runs.values() for line in lines):
        log_y(loss, "Loss (no unit, log scale)")
    for ax in (rate, loss):
        integer_x(ax, "Iteration (optimiser step)")
    return legend_below(figure, rate)


@styled
def overfitting(runs: Mapping[str, Lines]) -> Figure:
    """Draw validation PPL over training PPL by epoch, `{label: epochs of a summary}`; 1 is no gap."""
    figure, (ax,) = panels(1, 4)
    for label, epochs in runs.items():
        known = [line for line in epochs if line["val_ppl"] is not None]
        ratios = [line["val_ppl"] / line["train_ppl"] for line in known]
        ax.plot([line["epoch"] for line in known], ratios, marker="o", label=label)
    reference(ax.axhline, 1, "no gap")
    integer_x(ax, EPOCH)
    ax.set(title="Overfitting: the gap between text seen and unseen")
    ax.set_ylabel("Validation PPL / train PPL (ratio)")
    return legend_below(figure, ax)


@styled
def memory_by_stage(summaries: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> Figure:
    """Draw memory (GiB) by stage, one panel per run: a bar for memory held, a line to the peak.

    The GPU has bars in the panels of runs that used one.

    Args:
        summaries: contents of `summary.json`, one a run.
        labels: titles of the panels; by default the numbers of samples.
    """
    labels = run_labels(summaries) if labels is None else labels
    stages = [memory_stages(summary["memory"]) for summary in summaries]
    names = list(dict.fromkeys(stage["stage"] for run in stages for stage in run))
    rows = -(-len(summaries) // 2)
    height = 1.2 + rows * (0.6 + 0.4 * len(names))
    figure, axes = panels(len(summaries), height, rows, sharex=True, sharey=True)
    for ax, label, run in zip(axes, labels, stages, strict=True):
        _memory_bars(ax, run, names)
        ax.set(title=label, xlabel="Memory (GiB)")
        ax.tick_params(labelbottom=True)
        named_rows(ax, names)
    axes[0].set_xlim(0, 1.05 * max(ax.dataLim.xmax for ax in axes))
    for ax in axes[::2]:
        ax.set_ylabel("Stage")
    return legend_below(figure, *axes)


def _memory_bars(ax: Axes, stages: Lines, names: Sequence[str]) -> None:
    """Draw the stages of one run, each in the row of its name."""
    devices = ("cpu", "gpu") if stages[-1]["gpu_gib"] is not None else ("cpu",)
    thick = 0.4
    for slot, (colour, device) in enumerate(zip(OKABE_ITO, devices, strict=False)):
        y = [names.index(stage["stage"]) + (slot - (len(devices) - 1) / 2) * thick for stage in stages]
        now = [stage[f"{device}_gib"] or 0.0 for stage in stages]
        peak = [stage[f"{device}_peak_gib"] or np.nan for stage in stages]  # not drawn where not measured
        ax.barh(y, now, height=thick * 0.86, color=colour, label=f"{device.upper()} now")
        ax.hlines(y, now, peak, color=colour, lw=1.6)
        ax.plot(peak, y, "|", ms=8, mew=2, color=colour, label=f"{device.upper()} peak")


@styled
def ppl_by_reading(scores: Mapping[str, Any]) -> Figure:
    """Draw perplexity by tokens read of a conversation, and by contexts in the window.

    Args:
        scores: as from `inference.evaluate_texts`.
    """
    figure, axes = panels(2, 4.6)
    names = {
        "by_position": ("By place in the conversation", "Tokens of the conversation read before"),
        "by_history": ("By history", "Contexts in the window"),
    }
    for ax, (key, (title, what)) in zip(axes, names.items(), strict=True):
        ppls = [row["ppl"] for row in scores[key]]
        ax.bar([span(row) for row in scores[key]], ppls, color=BLUE, width=0.7)
        for x, value in enumerate(ppls):  # above the axes, where the line of all tokens does not pass
            ax.text(x, 1.02, f"{value:,.0f}", transform=ax.get_xaxis_transform(), ha="center", color=INK)
        reference(ax.axhline, scores["ppl"], f"all tokens: {scores['ppl']:,.0f}")
        ax.set_ylim(min(ppls) / 2, 1.1 * max(ppls))
        log_y(ax, "Perplexity per token (log scale)")
        ax.set_xlabel(what)
        ax.set_title(title, pad=22)
        ax.tick_params(axis="x", labelrotation=30)
    return legend_below(figure, axes[0])


@styled
def settings_summary(results: Mapping[str, Sequence[float]], base: str) -> Figure:
    """Draw the best validation PPL by setting: the mean, one dot per seed, and a line over their spread.

    A setting is grey if its mean is within seed noise of the base's, or if it has a single seed.

    Args:
        results: `{setting: validation PPL of each seed}`.
        base: the setting that the others are compared with.
    """
    figure, (ax,) = panels(1, 1.4 + 0.42 * len(results))
    _settings(ax, results, base)
    ax.set(xlabel="Best validation perplexity per token (lower is better)", ylabel="Setting")
    return figure


def _settings(ax: Axes, results: Mapping[str, Sequence[float]], base: str) -> None:
    """Draw a row for each setting, compared with the base: seeds, spread and mean."""
    middle = float(np.mean(results[base]))
    reference(ax.axvline, middle, "first row")
    for row, (setting, values) in enumerate(results.items()):
        mean = float(np.mean(values))
        colour = _colour(values, results[base])
        spread = [min(values), max(values)]
        ax.plot(spread, [row, row], color=colour, lw=3, alpha=0.5)
        ax.plot(values, [row] * len(values), "o", color=colour, ms=5, alpha=0.6)
        ax.plot(mean, row, "D", color=colour, ms=8)
        percent = round(100 * (mean / middle - 1), 1)
        change = "" if setting == base else f"  ({percent:+.1f}%)" if percent else "  (the same)"
        note = ax.text(1.01, row, f"{mean:,.1f}{change}", transform=ax.get_yaxis_transform())
        note.set(va="center", color=INK, weight="normal" if colour == QUIET else "bold")
    named_rows(ax, results)
    ax.margins(x=0.08)


def _colour(values: Sequence[float], base: Sequence[float]) -> str:
    """Return blue for lower and orange for higher than `base`; grey within seed noise."""
    difference = float(np.mean(values) - np.mean(base))
    if min(len(values), len(base)) < 2 or abs(difference) <= max(np.ptp(values), np.ptp(base)):
        return QUIET
    return BLUE if difference < 0 else ORANGE


def _series(lines: Lines, x: str, y: str, factor: float = 1) -> tuple[list[float], list[float]]:
    """Return two columns of `lines`, without lines that lack `y`."""
    known = [line for line in lines if line.get(y) is not None]
    return [line[x] for line in known], [factor * line[y] for line in known]
