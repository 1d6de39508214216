"""Figures of what contexts hold and what they are worth: probe, ablations, recall task."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..method.config import ModelConfig
from ..method.windows import slot_offsets
from .axes import BLUE, OKABE_ITO, ORANGE, QUIET, RULE, legend_below, log_y, panels, styled
from .figures import span

TICKS = (0, 5, 10, 20, 50, 100, 200, 500)  # of distances, in tokens
ABLATIONS = {
    "intact": "its own",
    "slot_0": "only slot 0 its own",
    "shuffled": "of other positions, mixed",
    "elsewhere": "of another conversation",
    "zero": "zeros",
}


@styled
def memory_of_contexts(probe: Mapping[str, Any], model: ModelConfig, slots: int = 4) -> Figure:
    """Draw what the slots of a window hold of each token, and what a context does, trained and untrained.

    Args:
        probe: as in a summary.
        slots: so many intervals back are drawn; where slots are not an interval apart, the whole window.
    """
    figure, (window, context) = panels(2, size=(12, 4.6))
    _window_memory(window, probe, model, slots)
    blocks = {"trained": probe}
    blocks |= {f"untrained, weights {std}": found for std, found in probe["fresh"].items()}
    for name, found in blocks.items():
        label = (
            f"{name}: {_memory_span(found)}; mean of the last {model.interval}: R² {found['mean_recall']:.2f}"
        )
        style = {"ls": "-" if found is probe else "--", "marker": "o"}
        context.plot(
            [1 + row["distance"] for row in found["recall"]], _explained(found), label=label, **style
        )
    context.set(title="Forgetting, trained and untrained", xscale="log")
    _distance_ticks(context, 1 + probe["recall"][-1]["distance"], shift=1)
    context.set_xlabel("Distance back from the context's own token (tokens, log scale)")
    top = 5 + max(value for found in blocks.values() for value in _explained(found))
    for ax in (window, context):
        ax.set(ylabel="Of the token's embedding (% of variance, R²)", ylim=(0, top))
        _legend_under(ax, columns=3 if ax is window else 1)
    return figure


def _window_memory(ax: Axes, probe: Mapping[str, Any], model: ModelConfig, slots: int) -> None:
    """Draw what is left of each token in the slot that read it last."""
    is_even = model.slots == "uniform"
    token = np.arange(slots * model.interval if is_even else model.context_window)  # distance back
    offsets = np.array([offset for offset in slot_offsets(model) if offset < len(token)])
    behind = (
        token - offsets[np.searchsorted(offsets, token, side="right") - 1]
    )  # of the slot that read it last
    left = np.interp(behind, [row["distance"] for row in probe["recall"]], _explained(probe))
    reach = -1 if probe["horizon"] is None else probe["horizon"]
    ax.fill_between(token, left, step="post", color=BLUE, alpha=0.35, lw=0, label="held by a slot")
    outside: dict[str, Any] = {"where": behind > reach, "step": "post", "transform": ax.get_xaxis_transform()}
    ax.fill_between(token, 1, color=RULE, lw=0, zorder=0, label="held by none", **outside)
    ax.plot(offsets, 0 * offsets, "s", ms=7, color=ORANGE, clip_on=False, label="slot", zorder=5)
    ax.set_title(f"{probe['coverage']:.0%} of the window is within some slot's memory span")
    ax.set_xlim(len(token) - 0.5, -0.5)
    ax.set_xlabel("Distance back from the position (tokens)")
    if not is_even:  # slot by slot as far as an interval
        ax.set_xscale("symlog", linthresh=model.interval)
        _distance_ticks(ax, len(token))
        ax.set_xlabel(f"Distance back from the position (tokens, log scale beyond {model.interval})")


def _memory_span(probe: Mapping[str, Any]) -> str:
    tokens = probe["horizon"]
    return "no memory" if tokens is None else f"memory span {tokens} token{'s' * (tokens != 1)}"


def _explained(probe: Mapping[str, Any]) -> list[float]:
    """Percent of the variance of a token's embedding, by distance."""
    return [100 * max(0, row["r2"]) for row in probe["recall"]]


def _distance_ticks(ax: Axes, end: int, shift: int = 0) -> None:
    ticks = [tick for tick in TICKS if tick + shift < end]
    ax.set_xticks([tick + shift for tick in ticks], map(str, ticks))
    ax.xaxis.set_minor_locator(NullLocator())


def _legend_under(ax: Axes, columns: int, space: float = 0.14) -> None:
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -space), ncols=columns)


@styled
def use_of_contexts(ablations: Mapping[str, Any]) -> Figure:
    """Draw what other contexts cost: by ablation, by slot alone, and where a pair of tokens comes again.

    Args:
        ablations: as in a summary.
    """
    figure, (changed, slots, pairs) = panels(3, size=(13, 4.6))
    _changed(changed, ablations["changed"])
    _slots(slots, ablations)
    _pairs(pairs, ablations["by_repetition"])
    return figure


def _changed(ax: Axes, changed: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a dot an ablation, with its standard error against intact."""
    intact = changed["intact"]["ppl"]
    ax.axvline(intact, color=QUIET, ls="--", lw=1.2)
    for row, (name, label) in enumerate(ABLATIONS.items()):
        found = changed[name]
        error = intact * found["error"] / 100
        colour = BLUE if name == "intact" else ORANGE
        ax.errorbar(found["ppl"], row, xerr=error, fmt="o", ms=8, color=colour, label=label)
        note = f"\n({found['percent']:+.1f}% ± {found['error']:.1f})" if name != "intact" else ""
        place = {"transform": ax.get_yaxis_transform(), "va": "center"}
        ax.text(1.02, row, f"{found['ppl']:,.1f}{note}", color=colour, **place)
    ax.set_yticks(range(len(ABLATIONS)), ABLATIONS.values())
    ax.set_ylim(len(ABLATIONS) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.margins(x=0.1)
    ax.set(
        title="Other contexts",
        xlabel="Validation perplexity per token",
        ylabel="Contexts that attention reads",
    )


def _slots(ax: Axes, ablations: Mapping[str, Any]) -> None:
    """Draw what the own context of one slot changes, if all others have another conversation's."""
    back, rise, error = ([row[key] for row in ablations["slots"]] for key in ("back", "percent", "error"))
    ax.errorbar(back, rise, yerr=error, fmt="o", lw=1.2, color=BLUE, ecolor=OKABE_ITO[5], label="one slot")
    changed = ablations["changed"]
    every = 100 * (changed["intact"]["ppl"] / changed["elsewhere"]["ppl"] - 1)
    ax.axhline(every, color=QUIET, ls="--", lw=1.2, label="all")
    ax.axhline(0, color=ORANGE, ls=":", lw=1.6, label="none")
    ax.set(title="Slots that hold their own context", ylabel="Perplexity against none (%)")
    ax.set_xlabel("Distance back of the slot (tokens)")
    _legend_under(ax, columns=3)


def _pairs(ax: Axes, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw intact beside other contexts, for tokens that repeat a pair of the window and for others."""
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
    ax.set(title="Where memory must show", xlabel="The next token forms (positions)")
    _legend_under(ax, columns=2, space=0.2)


@styled
def recall_accuracy(task: Mapping[str, Any]) -> Figure:
    """Draw the accuracy of recalled values, with a standard error, beside that of guessing.

    Args:
        task: `recall_task` of a summary.
    """
    figure, axes = panels(2, size=(11, 4.4))
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
        ax.axhline(100 * task["accuracy"], color=QUIET, ls="--", lw=1.2, label=f"all: {task['accuracy']:.1%}")
        ax.axhline(100 / task["values"], color=ORANGE, ls=":", lw=1.6, label="guessing a value")
        ax.set(title=title, xlabel=what, ylim=(0, 104))
        ax.grid(False, axis="x")
    axes[0].set_ylabel("Values recalled (%)")
    legend_below(figure, axes[0])
    return figure
