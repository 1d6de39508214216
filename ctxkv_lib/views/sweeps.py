"""Figures of many runs beside each other: settings against a base, a sweep, what memory is worth in it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .axes import INK, OKABE_ITO, QUIET, RULE, legend_below, log_y, panels, plain

BLUE, ORANGE = OKABE_ITO[:2]
SPLITS = {"val_ppl": "Validation", "test_ppl": "Test"}
MARKERS = "osD^vPX"  # of a variant; one more than there are colours, so that the pairs differ for long
COUNTED = ("--", ":", "-.")  # of n-grams, plain, with a cache, and with the text of the token table
REMEMBERED = {
    "horizon": "Horizon: tokens back that contexts hold anything of",
    "mean_recall": "R² of the mean of the last 20 tokens",
}

Row = Mapping[str, Any]  # of `rows` in sweep.json


def settings_summary(results: Mapping[str, Sequence[float]], base: str) -> Figure:
    """Best validation PPL by setting: the mean, a dot a seed, and a line over their spread.

    A setting has a colour only where its mean is further from the base's than the seeds of either lie apart;
    a single seed says nothing about that, and stays grey.

    Args:
        results: `{setting: validation PPL of each seed}`.
        base: the setting that the others are compared with.
    """
    figure, (ax,) = panels(1, size=(9, 1.4 + 0.42 * len(results)))
    _settings(ax, results, base)
    ax.set_xlabel("Best validation perplexity per token (lower is better)")
    ax.set_ylabel("Setting")
    return figure


def sweep_figure(results: Mapping[str, Any]) -> Figure:
    """The results of a sweep, validation and test side by side.

    With one sample count, each variant beside the first, and n-grams as vertical lines. With more, PPL by
    training tokens: a line a variant, a dot a seed, the fitted power law's exponent in the legend.

    Args:
        results: contents of `sweep.json`, with one row or more.
    """
    rows = results["rows"]
    splits = [split for split in SPLITS if any(row[split] for row in rows)]
    if len({row["samples"] for row in rows}) > 1:
        return _by_tokens(results, splits)
    trained, counted = ([row for row in rows if bool(row["seeds"]) == kind] for kind in (True, False))
    figure, axes = panels(len(splits), size=(8.5 * len(splits), 1.9 + 0.42 * len(trained)))
    for ax, split in zip(axes, splits, strict=True):
        known = {row["variant"]: row[split] for row in trained if row[split]}
        _settings(ax, known, next(iter(known)))
        for style, row in zip(COUNTED, counted, strict=False):
            if row[split]:
                ax.axvline(row[split][0], color=INK, ls=style, lw=1.4, label=row["variant"])
        ax.set_xlabel(f"{SPLITS[split]} perplexity per token (lower is better)")
    axes[0].set_ylabel("Variant")
    for ax in axes[1:]:  # its rows are those of the first
        ax.tick_params(labelleft=False)
    _legend(figure, axes[0], [row["variant"] for row in counted], "outside lower center")
    return figure


def memory_figure(results: Mapping[str, Any]) -> Figure:
    """Validation PPL by what contexts remember: how far back, and how much of the last 20 tokens.

    Each variant of the sweep whose contexts were probed is a point, with a line over the spread of its seeds.

    Args:
        results: contents of `sweep.json`, of one sample count.
    """
    figure, axes = panels(len(REMEMBERED), size=(5.5 * len(REMEMBERED), 5))
    for ax, (measure, label) in zip(axes, REMEMBERED.items(), strict=True):
        rows = [row for row in results["rows"] if measure in row.get("measured", {})]
        for place, row in enumerate(rows):
            values, at = row["val_ppl"], row["measured"][measure]
            colour, marker = OKABE_ITO[place % len(OKABE_ITO)], MARKERS[place % len(MARKERS)]
            ax.plot([at, at], [min(values), max(values)], color=colour, lw=3, alpha=0.4)
            name = plain(row["variant"])
            ax.plot(at, np.mean(values), color=colour, marker=marker, ms=8, ls="none", label=name)
        ax.set_xlabel(label)
        ax.set_xlim(left=0)
    axes[0].set_ylabel("Validation perplexity per token")
    legend_below(figure, axes[0])
    return figure


def recall_rows(rows: Sequence[Row]) -> list[list[str]]:
    """List the share of values that each variant recalls, for a table.

    Args:
        rows: of `sweep.json`. Those without that measurement, such as n-grams, are left out.
    """
    shares = {row["variant"]: row.get("measured", {}).get("recalled") for row in rows}
    return [[variant, f"{share:.1%}"] for variant, share in shares.items() if share is not None]


def _by_tokens(results: Mapping[str, Any], splits: Sequence[str]) -> Figure:
    figure, axes = panels(len(splits), size=(5.4 * len(splits) + 3, 5))
    laws = {law["variant"]: law for law in results["power_laws"]}
    names: dict[str, str] = {}
    for ax, split in zip(axes, splits, strict=True):
        groups: dict[str, list[Row]] = {}
        for row in results["rows"]:
            if row[split]:
                groups.setdefault(row["variant"], []).append(row)
        kinds = {"trained": 0, "counted": 0}
        for variant, rows in groups.items():
            kind = "trained" if rows[0]["seeds"] else "counted"
            law = laws.get(variant, {}).get("val_ppl")
            names[variant] = f"{variant}: tokens^{-law['exponent']:.2f}" if law else variant
            _line(ax, rows, split, kinds[kind], names[variant])
            kinds[kind] += 1
        ax.set_title(SPLITS[split], loc="left", weight="bold")
        ax.set_xscale("log")
        ticks = sorted({row["train_tokens"] for row in results["rows"]})
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("Training tokens (log scale)")
        log_y(ax, "Perplexity per token (log scale)")
    _legend(figure, axes[0], list(names.values()), "outside right upper")
    return figure


def _line(ax: Axes, rows: Sequence[Row], split: str, place: int, name: str) -> None:
    """Means by training tokens and, of what was trained, each seed."""
    tokens, means = [row["train_tokens"] for row in rows], [np.mean(row[split]) for row in rows]
    if not rows[0]["seeds"]:
        ax.plot(tokens, means, color=INK, ls=COUNTED[place % len(COUNTED)], lw=1.6, label=plain(name))
        return
    colour, marker = OKABE_ITO[place % len(OKABE_ITO)], MARKERS[place % len(MARKERS)]
    ax.plot(tokens, means, color=colour, lw=2, marker=marker, ms=6, label=plain(name))
    seeds = [(row["train_tokens"], value) for row in rows for value in row[split]]
    ax.plot(*zip(*seeds, strict=True), marker, color=colour, ms=4, alpha=0.4, label=f"{plain(name)}: seeds")


def _legend(
    figure: Figure,
    ax: Axes,
    names: Sequence[str],
    place: Literal["outside lower center", "outside right upper"],
) -> None:
    """A legend of the lines with these names, outside of the axes."""
    shown = {plain(name) for name in names}
    handles = [line for line in ax.get_lines() if line.get_label() in shown]
    if handles:
        columns = 1 if "right" in place else len(handles)
        figure.legend(handles=handles, loc=place, ncols=columns, frameon=False)


def _settings(ax: Axes, results: Mapping[str, Sequence[float]], base: str) -> None:
    """A row for each setting: seeds, their spread and mean, and how far that is from the base's."""
    middle = float(np.mean(results[base]))
    ax.axvline(middle, color=QUIET, ls="--", lw=1.2)
    for row, (setting, values) in enumerate(results.items()):
        name = plain(setting)
        mean = float(np.mean(values))
        colour = _verdict(values, results[base])
        ax.plot(
            [min(values), max(values)], [row, row], color=colour, lw=3, alpha=0.5, label=f"{name}: spread"
        )
        ax.plot(values, [row] * len(values), "o", color=colour, ms=5, alpha=0.6, label=f"{name}: seeds")
        ax.plot(mean, row, "D", color=colour, ms=8, label=name)
        percent = round(100 * (mean / middle - 1), 1)
        change = "" if setting == base else f"  ({percent:+.1f}%)" if percent else "  (the same)"
        note = ax.text(1.01, row, f"{mean:,.1f}{change}", transform=ax.get_yaxis_transform())
        note.set(va="center", color=INK if colour == QUIET else colour, weight="bold")
    ax.set_yticks(range(len(results)), map(plain, results))
    ax.set_ylim(len(results) - 0.4, -0.6)
    ax.grid(True, axis="x", color=RULE)
    ax.grid(False, axis="y")
    ax.margins(x=0.08)


def _verdict(values: Sequence[float], base: Sequence[float]) -> str:
    """Blue for lower and orange for higher than `base`; grey where the seeds cannot tell."""
    difference = float(np.mean(values) - np.mean(base))
    if min(len(values), len(base)) < 2 or abs(difference) <= max(np.ptp(values), np.ptp(base)):
        return QUIET
    return BLUE if difference < 0 else ORANGE
