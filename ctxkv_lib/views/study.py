"""Figures of the study: settings compared with a base, sweeps, what contexts are worth, recall."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ..report.document import words
from ..report.labels import span
from .axes import (
    BLUE,
    INK,
    OKABE_ITO,
    ORANGE,
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
from .power_laws import SPLITS, power_laws

MARKERS = "osD^vPX"  # one more than colours, so that pairs of both repeat as late as possible
VARIANTS = cycler(color=OKABE_ITO * len(MARKERS)) + cycler(marker=MARKERS * len(OKABE_ITO))
BASELINES: dict[str, tuple[str, Any]] = {  # name and line style of n-gram baselines
    "kneser_ney": ("n-grams", "--"),
    "kneser_ney_cache": ("n-grams and cache", ":"),
    "kneser_ney_caches": ("n-grams and caches", "-"),
    "kneser_ney_table_cache": ("n-grams (table's text too) and cache", "-."),
    "kneser_ney_table_caches": ("n-grams (table's text too) and caches", (0, (6, 1.5, 1, 1.5, 1, 1.5))),
}
STYLES = dict(BASELINES.values())
REMEMBERED = {
    "horizon": "Memory span of contexts (tokens, R² > 0.01)",
    "mean_recall": "Decodability of the last interval's mean (R²)",
}

Row = Mapping[str, Any]  # of `rows` in the results of a sweep


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


@styled
def sweep_figure(results: Mapping[str, Any]) -> Figure:
    """Draw the results of a sweep, validation and test side by side.

    With one sample count, each variant beside the first, and n-grams as vertical lines, or below the axis
    where they lie beyond it. With more, PPL by training tokens: one line per variant, one dot per seed, the
    power law of the first split in the legend.

    Args:
        results: results of a sweep, with one row or more.
    """
    rows = results["rows"]
    splits = [split for split in SPLITS if any(row[split] for row in rows)]
    if len({row["samples"] for row in rows}) > 1:
        return _by_tokens(results, splits)
    trained, counted = ([row for row in rows if bool(row["seeds"]) == kind] for kind in (True, False))
    most = max(wrapped(row["variant"]).count("\n") for row in trained)  # line breaks of a name
    height = 1 + len(trained) * (0.25 + 0.18 * most) + 0.2 * len(counted)
    figure, axes = panels(len(splits), 0.5 + len(splits) * height, rows=len(splits))
    for ax, split in zip(axes, splits, strict=True):
        known = {row["variant"]: row[split] for row in trained if row[split]}
        _settings(ax, known, next(iter(known)))
        (low, high), beyond = ax.get_xlim(), []
        for row in (row for row in counted if row[split]):
            name, value = row["variant"], row[split][0]
            if low < value < high:
                ax.axvline(value, color=INK, ls=STYLES[name], lw=1.4, label=name)
            else:
                beyond.append(f"{name}: {value:,.1f}")
        label = f"{SPLITS[split]} perplexity per token (lower is better)"
        ax.set(xlabel="\n".join([label, *beyond]), ylabel="Variant")
    return legend_below(figure, *axes)


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


def _by_tokens(results: Mapping[str, Any], splits: Sequence[str]) -> Figure:
    """Draw means by training tokens, and each seed of trained models."""
    names = {row["variant"] for row in results["rows"]}
    figure, axes = panels(len(splits), 3.4 * len(splits) + 0.2 * len(names), rows=len(splits))
    laws = {law["variant"]: law.get(splits[0]) for law in power_laws(results["rows"])}
    fitted = SPLITS[splits[0]].lower()
    for ax, split in zip(axes, splits, strict=True):
        styles = cycle(VARIANTS)
        for variant in dict.fromkeys(row["variant"] for row in results["rows"] if row[split]):
            rows = [row for row in results["rows"] if row["variant"] == variant and row[split]]
            style = next(styles) if rows[0]["seeds"] else {"color": INK, "ls": STYLES[variant], "lw": 1.6}
            law = laws.get(variant)
            name = f"{variant}: {fitted} ~ tokens^{-law['exponent']:.2f}" if law else variant
            means = [(row["train_tokens"], np.mean(row[split])) for row in rows]
            ax.plot(*zip(*means, strict=True), ms=6, label=wrapped(name), **style)
            if rows[0]["seeds"]:
                seeds = [(row["train_tokens"], value) for row in rows for value in row[split]]
                ax.plot(*zip(*seeds, strict=True), ls="none", ms=4, alpha=0.4, **style)
        ax.set(title=SPLITS[split], xscale="log", xlabel="Training tokens (log scale)")
        ticks = sorted({row["train_tokens"] for row in results["rows"]})
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.xaxis.set_minor_formatter(NullFormatter())
        log_y(ax, "Perplexity per token (log scale)")
    return legend_below(figure, *axes)


@styled
def memory_figure(results: Mapping[str, Any]) -> Figure:
    """Draw validation PPL by memory span, and by decodability of the last interval's mean.

    Each variant of the sweep whose contexts were probed is a point, with a line over the spread of its seeds.

    Args:
        results: results of a sweep, of one sample count.
    """
    figure, axes = panels(len(REMEMBERED), 5)
    for ax, (measure, label) in zip(axes, REMEMBERED.items(), strict=True):
        rows = [row for row in results["rows"] if measure in row.get("measured", {})]
        for row, style in zip(rows, cycle(VARIANTS), strict=False):
            values, at = row["val_ppl"], row["measured"][measure]
            point: dict[str, Any] = {"ms": 8, "ls": "none", "label": row["variant"], **style}
            ax.plot([at, at], [min(values), max(values)], color=style["color"], lw=3, alpha=0.4)
            ax.plot(at, np.mean(values), **point)
        (integer_x if measure == "horizon" else Axes.set_xlabel)(ax, label)
        ax.set_xlim(left=0)
    axes[0].set_ylabel("Validation perplexity per token")
    return legend_below(figure, axes[0])


def recall_rows(rows: Sequence[Row]) -> list[list[str]]:
    """List the share of values that each variant recalls, for a table.

    Args:
        rows: of a sweep. Those without that measurement, such as n-grams, are left out.
    """
    shares = {row["variant"]: row.get("measured", {}).get("recalled") for row in rows}
    return [[variant, f"{share:.1%}"] for variant, share in shares.items() if share is not None]


@styled
def use_of_contexts(ablations: Mapping[str, Any]) -> Figure:
    """Draw the effect of other contexts: by ablation, by single slot, and on repeated pairs of tokens.

    Args:
        ablations: as in a summary.
    """
    figure, (changed, slots, pairs) = panels(3, 10.5, rows=3)
    _changed(changed, ablations["changed"])
    _slots(slots, ablations)
    _pairs(pairs, ablations["by_repetition"])
    return legend_below(figure, slots, pairs)


def _changed(ax: Axes, changed: Mapping[str, Mapping[str, float]]) -> None:
    """Draw one dot per ablation, with its standard error compared with intact."""
    intact = changed["intact"]["ppl"]
    reference(ax.axvline, intact)
    labels = words("en").contexts
    for row, (name, label) in enumerate(labels.items()):
        found = changed[name]
        error = intact * found["error"] / 100
        colour = BLUE if name == "intact" else ORANGE
        ax.errorbar(found["ppl"], row, xerr=error, fmt="o", ms=8, color=colour, label=label)
        note = f"\n({words('en').cost(found)})" if name != "intact" else ""
        place = ax.get_yaxis_transform()
        ax.text(1.02, row, f"{found['ppl']:,.1f}{note}", transform=place, color=colour, va="center")
    named_rows(ax, labels.values())
    ax.margins(x=0.1)
    ax.set(title="Other contexts", xlabel="Validation perplexity per token", ylabel="Contexts read")


def _slots(ax: Axes, ablations: Mapping[str, Any]) -> None:
    """Draw the effect of one slot's own context while all others have another conversation's."""
    back, rise, error = (
        [row[key] for row in ablations["slots"]] for key in ("back", "percent_vs_elsewhere", "error")
    )
    ax.errorbar(back, rise, yerr=error, fmt="o", lw=1.2, color=BLUE, ecolor=OKABE_ITO[5], label="one slot")
    changed = ablations["changed"]
    reference(ax.axhline, 100 * (changed["intact"]["ppl"] / changed["elsewhere"]["ppl"] - 1), "all slots")
    reference(ax.axhline, 0, "none", color=ORANGE, ls=":")
    ax.set(title="Slots that hold their own context", ylabel="Perplexity compared with none (%)")
    ax.set_xlabel("Distance back of the slot (tokens)")


def _pairs(ax: Axes, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw intact and other contexts, for tokens that repeat a pair of the window and for others."""
    names = {0: "a new pair", 1: "a repeated pair"}
    for shift, key, colour, label in (
        (-0.18, "ppl", BLUE, "own contexts"),
        (0.18, "other_ppl", ORANGE, "another's"),
    ):
        x = [place + shift for place in range(len(rows))]
        bars = ax.bar(x, [row[key] for row in rows], width=0.34, color=colour, label=label)
        ax.bar_label(bars, fmt="{:,.0f}", padding=2)
    ax.set_xticks(range(len(rows)), [f"{names[int(row['from'])]}\n({row['tokens']:,})" for row in rows])
    ppls = [row[key] for row in rows for key in ("ppl", "other_ppl")]
    ax.set_ylim(min(ppls) / 2, 1.5 * max(ppls))
    log_y(ax, "Perplexity per token (log scale)")
    ax.grid(False, axis="x")
    ax.set(title="New and repeated pairs of tokens", xlabel="The next token forms (positions)")


@styled
def recall_accuracy(task: Mapping[str, Any]) -> Figure:
    """Draw the accuracy of recalled values with its standard error, and that of guessing.

    Args:
        task: `recall_task` of a summary.
    """
    figure, axes = panels(2, 4.4)
    names = {
        "by_distance": ("By distance", "Distance from the value to recall (tokens)"),
        "by_place": ("By place between two slots", "Tokens the nearest slot has read since the value"),
    }
    for ax, (key, (title, what)) in zip(axes, names.items(), strict=True):
        share = np.array([row["accuracy"] for row in task[key]])
        tokens = np.array([row["tokens"] for row in task[key]])
        bars = range(len(share))
        errors = 100 * np.sqrt(share * (1 - share) / tokens)
        ax.bar(bars, 100 * share, yerr=errors, color=BLUE, ecolor=QUIET, width=0.75)
        ax.set_xticks(bars, map(span, task[key]), rotation=0 if len(share) < 8 else 60)
        reference(ax.axhline, 100 * task["accuracy"], f"all: {task['accuracy']:.1%}")
        reference(ax.axhline, 100 / task["values"], "guessing a value", color=ORANGE, ls=":")
        ax.set(title=title, xlabel=what, ylim=(0, 104))
        ax.grid(False, axis="x")
    axes[0].set_ylabel("Values recalled (%)")
    return legend_below(figure, axes[0])
