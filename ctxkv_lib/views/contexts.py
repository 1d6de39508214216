"""What contexts are good for: perplexity with other contexts in their place."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .axes import OKABE_ITO, QUIET, log_y, panels

BLUE, ORANGE = OKABE_ITO[:2]
CHANGED = {
    "intact": "its own",
    "slot_0": "only slot 0 its own",
    "shuffled": "of other positions, mixed",
    "elsewhere": "of another conversation",
    "zero": "zeros",
}


def use_of_contexts(ablations: Mapping[str, Any]) -> Figure:
    """What other contexts cost: by ablation, by slot alone, and where a pair of tokens comes again.

    Args:
        ablations: as in a summary.
    """
    figure, (changed, slots, pairs) = panels(3, size=(13, 4.6))
    _changed(changed, ablations["changed"])
    _slots(slots, ablations)
    _pairs(pairs, ablations["by_repetition"])
    return figure


def _changed(ax: Axes, changed: Mapping[str, Mapping[str, float]]) -> None:
    """A dot an ablation, with its standard error against intact."""
    intact = changed["intact"]["ppl"]
    ax.axvline(intact, color=QUIET, ls="--", lw=1.2)
    for row, name in enumerate(CHANGED):
        found = changed[name]
        colour = BLUE if name == "intact" else ORANGE
        ax.errorbar(
            found["ppl"],
            row,
            xerr=intact * found["error"] / 100,
            fmt="o",
            ms=8,
            lw=2.5,
            color=colour,
            label=CHANGED[name],
        )
        change = round(found["percent"], 1) + 0
        note = "" if name == "intact" else f"\n({change:+.1f}% ± {found['error']:.1f})"
        ax.text(
            1.02,
            row,
            f"{found['ppl']:,.1f}{note}",
            transform=ax.get_yaxis_transform(),
            color=colour,
            va="center",
        )
    ax.set_yticks(range(len(CHANGED)), CHANGED.values())
    ax.set_ylim(len(CHANGED) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.margins(x=0.1)
    ax.set_ylabel("Contexts that attention reads")
    ax.set_xlabel("Validation perplexity per token")
    ax.set_title("Other contexts", loc="left", weight="bold")


def _slots(ax: Axes, ablations: Mapping[str, Any]) -> None:
    """What the own context of one slot changes, if all others have another conversation's."""
    back = [slot["back"] for slot in ablations["slots"]]
    rise, error = ([slot[key] for slot in ablations["slots"]] for key in ("percent_vs_elsewhere", "error"))
    ax.errorbar(
        back, rise, yerr=error, fmt="o", ms=4.5, lw=1.2, color=BLUE, ecolor=OKABE_ITO[5], label="one slot"
    )
    changed = ablations["changed"]
    every = 100 * (changed["intact"]["ppl"] / changed["elsewhere"]["ppl"] - 1)
    ax.axhline(every, color=QUIET, ls="--", lw=1.2, label="all")
    ax.axhline(0, color=ORANGE, ls=":", lw=1.6, label="none")
    ax.set_xlabel("Distance back of the slot (tokens)")
    ax.set_ylabel("Perplexity against none (%)")
    ax.set_title("Slots that hold their own context", loc="left", weight="bold")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, ncols=3)


def _pairs(ax: Axes, rows: list[Mapping[str, float]]) -> None:
    """Intact beside other contexts, for tokens that form a pair of the window anew and for others."""
    names = {0: "others", 1: "pair seen in\nthe window"}
    for offset, (key, colour, label) in enumerate(
        (("ppl", BLUE, "own contexts"), ("other_ppl", ORANGE, "another's"))
    ):
        x = [place + 0.36 * (offset - 0.5) for place in range(len(rows))]
        bars = ax.bar(x, [row[key] for row in rows], width=0.34, color=colour, label=label)
        ax.bar_label(bars, [f"{row[key]:,.0f}" for row in rows], padding=2)
    ax.set_xticks(range(len(rows)), [f"{names[int(row['from'])]}\n({row['tokens']:,})" for row in rows])
    ppls = [row[key] for row in rows for key in ("ppl", "other_ppl")]
    ax.set_ylim(min(ppls) / 2, 1.5 * max(ppls))
    log_y(ax, "Perplexity per token (log scale)")
    ax.grid(False, axis="x")
    ax.set_xlabel("The next token forms (positions)")
    ax.set_title("Where memory must show", loc="left", weight="bold")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False, ncols=2)
