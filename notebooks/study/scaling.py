"""Test perplexity by training tokens, with bootstrap bands, and where a model meets the n-grams.

    python notebooks/study/scaling.py FOLDER

draws the two figures of the study's answer from its results, `scaling.png` and `evidence.png`, and prints the
crossings.
"""

import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import continuous_cache
import evidence
import numpy as np
from ctxkv_lib.research.sweep_table import Results
from intervals import DRAWS, EDGES, Losses, losses, resampled, seed_shares, test_tokens
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ctxkv_lib.files import read_json
from ctxkv_lib.views.axes import (
    BLUE,
    INK,
    OKABE_ITO,
    ORANGE,
    legend_below,
    log_y,
    panels,
    reference,
    save,
    styled,
)

CACHED, COPIED = "tuned with a continuous cache", "tuned, copying"
COUNTED, WITH_TABLE = "n-grams, four caches", "n-grams, four caches and the table's text"
STYLES: dict[str, dict[str, Any]] = {
    "exact": {"color": ORANGE, "marker": "s"},
    "tuned": {"color": BLUE, "marker": "o"},
    COPIED: {"color": OKABE_ITO[3], "marker": "D"},
    CACHED: {"color": OKABE_ITO[2], "marker": "^"},
    COUNTED: {"color": INK, "ls": ":"},
    WITH_TABLE: {"color": INK, "ls": "--"},
}

# By row and training tokens: [seeds, conversations], mean losses in nats.
Lines = dict[str, dict[int, Losses]]


class Crossing(NamedTuple):
    """Where a row meets another: training tokens, and those that hold 95% of the draws; inf: nowhere here."""

    tokens: float
    low: float
    high: float


@cache
def read_parts() -> list[Results]:
    """Read the parts whose runs are measured on the ten test conversations."""
    return [continuous_cache.results(part) for part in ("answer", "full")]


def training_tokens() -> dict[int, int]:
    """Return the training tokens of each sample count."""
    return {row["samples"]: row["train_tokens"] for results in read_parts() for row in results["rows"]}


def read_lines() -> Lines:
    """Read the losses of all rows on the ten test conversations, by training tokens."""
    found: Lines = {name: {} for name in STYLES}
    sizes = training_tokens()
    for results in read_parts():
        for samples in {cell["samples"] for cell in results["cells"] if cell["variant"] == COPIED}:
            found[COPIED][sizes[samples]] = losses(results, samples, COPIED)[0]
        for samples, counted in results["ngrams"].items():
            for name, kind in ((COUNTED, "kneser_ney_caches"), (WITH_TABLE, "kneser_ney_table_caches")):
                found[name][sizes[int(samples)]] = np.array([counted[kind]["test_conversations"]])
    runs = continuous_cache.found("cache")
    for name, recipe, kind in (
        ("exact", "exact", "model"),
        ("tuned", "tuned", "model"),
        (CACHED, "tuned", "continuous cache"),
    ):
        for samples in sorted({run["samples"] for run in runs if run["variant"] == recipe}):
            rows = [r["rows"][kind] for r in runs if (r["variant"], r["samples"]) == (recipe, samples)]
            found[name][sizes[samples]] = np.array([row["test_conversations"] for row in rows])
    return found


def drawn(lines: Lines, draws: int = DRAWS) -> dict[str, dict[int, NDArray[np.float64]]]:
    """Draw mean losses of each row and size, `[1 + draws]`; the first is that of all conversations and seeds.

    A draw takes the same conversations for all rows and sizes.
    """
    draw = np.random.default_rng(0)

    count = next(iter(next(iter(lines.values())).values())).shape[1]
    weights = np.vstack([np.ones(count), resampled(draw, count, draws)]) * test_tokens(count)
    weights /= weights.sum(axis=1, keepdims=True)

    def means(own: Losses) -> NDArray[np.float64]:
        shares = np.vstack([np.full(len(own), 1 / len(own)), seed_shares(draw, len(own), draws)])
        return ((shares @ own) * weights).sum(axis=1)

    return {name: {size: means(own) for size, own in sizes.items()} for name, sizes in lines.items()}


def crossing(losses: dict[str, dict[int, NDArray[np.float64]]], own: str, other: str) -> Crossing:
    """Find from how many training tokens on a row is lower than another, linearly between sizes (log scale).

    Args:
        losses: those of `drawn`. A row that is lower at the smallest size meets the other there.
    """
    sizes = sorted(losses[own].keys() & losses[other])
    above = np.array([losses[own][size] - losses[other][size] for size in sizes])  # [sizes, 1 + draws]
    met = np.full(above.shape[1], np.inf)
    for place in reversed(range(len(sizes))):
        is_lower = (above[place:] < 0).all(axis=0)
        if place == 0:
            met[is_lower] = sizes[0]
            break
        before = above[place - 1]
        falls = before > above[place]
        share = np.divide(before, before - above[place], out=np.zeros_like(before), where=falls).clip(0, 1)
        between = np.exp(np.log(sizes[place - 1]) + share * np.log(sizes[place] / sizes[place - 1]))
        met = np.where(is_lower, between, met)
    return Crossing(float(met[0]), *np.percentile(met[1:], EDGES, method="inverted_cdf"))


@styled
def scaling_figure(lines: Lines) -> Figure:
    """Draw test perplexity by training tokens, and how far it is above that of n-grams with the table's text.

    The bands are of that difference, from draws of the same conversations for both: those of the perplexities
    themselves would show how unlike the ten conversations are. A vertical line marks a crossing.
    """
    losses = drawn(lines)
    figure, (level, beside) = panels(2, 9, rows=2)
    for name, style in STYLES.items():
        sizes = sorted(losses[name])
        level.plot(sizes, [np.exp(losses[name][size][0]) for size in sizes], ms=7, label=name, **style)
        if WITH_TABLE in name:
            reference(beside.axhline, 0, color=INK)
            continue
        above = np.array([100 * np.expm1(losses[name][size] - losses[WITH_TABLE][size]) for size in sizes])
        beside.plot(sizes, above[:, 0], ms=7, **style)
        low, high = np.percentile(above[:, 1:], EDGES, axis=1)
        beside.fill_between(sizes, low, high, color=style["color"], alpha=0.15, lw=0)
        if np.isfinite(met := crossing(losses, name, WITH_TABLE).tokens):
            for ax in (level, beside):
                reference(ax.axvline, met, color=style["color"])
    ticks = sorted(lines[WITH_TABLE])
    for ax in (level, beside):
        ax.set(xscale="log", xlabel="Training tokens (log scale)")
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.minorticks_off()
    log_y(level, "Test perplexity per token (log scale)")
    beside.set(ylabel="Above n-grams with the table's text (%)", ylim=(-30, 200))
    return legend_below(figure, level)


def main(folder: Path) -> None:
    """Draw both figures, and print the crossings."""
    lines = read_lines()
    losses = drawn(lines)
    for own in ("exact", "tuned", COPIED, CACHED):
        for other in (COUNTED, WITH_TABLE):
            print(f"{own} meets {other}:", *(f"{value:,.0f}" for value in crossing(losses, own, other)))
    folder.mkdir(parents=True, exist_ok=True)
    save(scaling_figure(lines), folder / "scaling.png")
    save(evidence.evidence_figure(read_json(evidence.RESULTS)), folder / "evidence.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
