"""Draw the figures of the study from its results: `python notebooks/study/figures.py`."""

from collections.abc import Sequence
from statistics import mean
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from costs import costs
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import blended_transform_factory
from rows import PAIRS, label
from tables import (
    DISTANCES,
    FIFTY,
    SIZES,
    TEN,
    TOP,
    Cell,
    cells_of,
    change,
    losses,
    ppls_of,
    read,
    tested,
)

import ctxkv_lib as ctxkv
from ctxkv_lib.report.difference import Interval, interval
from ctxkv_lib.views.figures import GREY, OKABE_ITO, WIDTH, ink

FIGURES = TOP / "docs" / "_static"
# Width of a figure on a phone, in inches (368 pixels).
PHONE = 4.84
# Smallest font size on a phone, in points (12 pixels).
LETTERS = 11.5
BLUE, ORANGE, GREEN, PINK, AMBER, SKY, BLACK = OKABE_ITO
STRONGEST = "kneser_ney_table_caches"
LINES: dict[str, dict[str, Any]] = {
    "exact": {"label": "exact", "color": ORANGE, "marker": "s"},
    "tuned": {"label": "tuned without copying", "color": SKY, "marker": "o"},
    "tuned, copying": {"label": "tuned", "color": BLUE, "marker": "D"},
    "kneser_ney": {"label": "n-grams", "color": GREY, "ls": "-.", "marker": ""},
    "kneser_ney_caches": {"label": "n-grams, four caches", "color": BLACK, "ls": ":", "marker": ""},
    STRONGEST: {
        "label": "n-grams, four caches,\ntoken table's text",
        "color": BLACK,
        "ls": "--",
        "marker": "",
    },
}

# For each row: its label, and by how many points the label is shifted to the right and up.
MEMORY_LABELS = {
    "exact, one slot": ("exact, only the present context", 8, 0),
    "contexts": ("contexts", -8, 6),
    "contexts with copying": ("with copying", 8, 0),
    "kneser_ney_caches": ("n-grams, four caches", 8, 0),
    "kneser_ney_table_caches": ("n-grams, four caches,\ntoken table's text", -8, 0),
}


def panels(count: int, height: float, **share: Any) -> tuple[Any, Any]:
    """Create a figure with `count` axes in one column, in the package's style."""
    plt.rcParams.update(ctxkv.STYLE)
    figure, axes = plt.subplots(count, 1, figsize=(WIDTH, height), squeeze=False, **share)
    # A padding of 0.1 inches keeps titles away from axis labels.
    figure.get_layout_engine().set(h_pad=0.1)
    return figure, axes[:, 0]


def label_end(ax: Any, x: float, y: float, text: str, color: str, shift: float = 0) -> None:
    """Write text next to the right end of a line, shifted up by `shift` points."""
    options = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
    ax.annotate(text, (x, y), (8, shift), color=ink(color), fontsize=9.5, **options)


def log_axis(ax: Any, axis: str, ticks: Sequence[float], texts: Sequence[str] | None = None) -> None:
    """Give the axis "x" or "y" a logarithmic scale, with ticks only at the given values."""
    ax.set(**{f"{axis}scale": "log"})
    ax.minorticks_off()
    getattr(ax, f"set_{axis}ticks")(ticks, texts or [f"{tick:,}" for tick in ticks])


def tokens_by_size() -> dict[int, int]:
    return {
        samples: cell["train_tokens"]
        for (_, samples), (cell, *_) in cells_of("answer/sweep", "full/sweep").items()
        if "seed" in cell
    }


def size_axis(ax: Any) -> None:
    """Make the x axis logarithmic. Label it with numbers of training tokens and of conversations."""
    tokens = tokens_by_size()
    texts = [
        f"{count / 1e6:.1f}M\n{size:,}" if count > 1e6 else f"{count / 1e3:.0f}k\n{size:,}"
        for size, count in tokens.items()
    ]
    log_axis(ax, "x", [*tokens.values()], texts)
    ax.set(xlabel="Training tokens (above) and conversations")


def draw_line(ax: Any, name: str, values: dict[int, float], shift: float) -> None:
    """Draw a line of values by number of conversations, with a label. Hollow points have no interval."""
    tokens, look = tokens_by_size(), {"ms": 5, **LINES[name]}
    ax.plot([tokens[size] for size in values], [*values.values()], **look)
    hollow = [size for size in values if look["marker"] and not losses(10, name, size)]
    points = look | {"mfc": "white", "ls": "none", "zorder": 3}
    ax.plot([tokens[size] for size in hollow], [values[size] for size in hollow], **points)
    label_end(ax, tokens[max(values)], values[max(values)], look["label"], look["color"], shift)


def draw_intervals(
    ax: Any, intervals: dict[int, Interval], factor: float, **look: Any
) -> tuple[float, float]:
    """Draw values with intervals. Multiply their x coordinates by `factor`. Return the last point."""
    at = factor * np.array([*intervals])
    middle, low, high = np.array([*intervals.values()]).T
    ax.errorbar(at, middle, (middle - low, high - middle), capsize=2, **look)
    return at[-1], middle[-1]


def levels_of(name: str) -> dict[int, float]:
    """Return the test perplexity of a row for each number of conversations that has results."""
    return {size: mean(ppls) for size in TEN if (ppls := ppls_of(tested(10), name, size))}


def draw_levels(ax: Any, names: Sequence[str], shifts: dict[str, float]) -> None:
    """Draw test perplexity by training tokens. `shifts` says by how many points to move labels up."""
    for name in names:
        draw_line(ax, name, levels_of(name), shifts.get(name, 0))
    log_axis(ax, "y", (150, 200, 300, 500, 700, 1_000))
    size_axis(ax)
    ax.set(ylim=(125, None), title="Test perplexity per token (lower is better)")


def draw_ngrams() -> Any:
    """Draw test perplexity by training tokens: its value, and its ratio to the strongest n-grams."""
    figure, (above, below) = panels(2, 8.4)
    shifts = {"kneser_ney": 22, "kneser_ney_caches": 17, "tuned": 5, STRONGEST: -9, "tuned, copying": -10}
    draw_levels(above, [*LINES], shifts)
    tokens, strongest = tokens_by_size(), levels_of(STRONGEST)
    for name, shift in {"exact": 0, "tuned": 3, "tuned, copying": -9, "kneser_ney_caches": 15}.items():
        draw_line(below, name, {size: ppl / strongest[size] for size, ppl in levels_of(name).items()}, shift)
        changes = {tokens[n]: shown[0] for n in TEN if (shown := change(10, f"{name} / {STRONGEST}", n))}
        _, low, high = 1 + np.array([*changes.values()]).T / 100
        below.fill_between([*changes], low, high, color=LINES[name]["color"], alpha=0.15, lw=0)
    below.axhline(1, color="black", ls="--")
    ticks = (0.8, 1, 1.5, 2, 3, 4, 6)
    log_axis(below, "y", ticks, [f"{100 * (tick - 1):+.0f}%" if tick != 1 else "0%" for tick in ticks])
    size_axis(below)
    below.set_title("Above the strongest n-grams (dashed), with 95% intervals")
    return figure


def draw_models() -> Any:
    """Draw how much higher or lower the test perplexity is with contexts than with their alternatives."""
    figure, (ax,) = panels(1, 4.4)
    looks = {
        "no contexts": (GREY, "o"),
        "tokens at the same slots": (AMBER, "s"),
        "last 32 tokens": (ORANGE, "D"),
        "GRU": (GREEN, "^"),
        "gated, end to end": (PINK, "v"),
    }
    for place, (name, (color, marker)) in enumerate(looks.items()):
        points = {size: shown[0] for size in FIFTY if (shown := change(50, f"contexts / {name}", size))}
        end = draw_intervals(ax, points, 1.03 ** (place - 2), color=color, marker=marker, ms=5)
        shift = {"tokens at the same slots": -12, "gated, end to end": 9}.get(name, 0)
        text = {"gated, end to end": "gated contexts", "no contexts": "the current token alone"}
        label_end(ax, *end, text.get(name, name), color, shift)
    ax.axhline(0, color=BLUE, lw=2)
    log_axis(ax, "x", FIFTY)
    ax.set(xlabel="Training conversations")
    ax.set_title("Test perplexity of contexts compared with each model (%), 95% intervals")
    return figure


def draw_memory() -> Any:
    """Draw test perplexity by the number of bytes that a model keeps after reading 640 tokens."""
    figure, (ax,) = panels(1, 4.8)
    for name, cost in costs().items():
        ppls = [mean(found) for size in (50, 200) if (found := ppls_of(tested(50), name, size))]
        if not ppls:
            continue
        color = BLUE if name.startswith("contexts") else ORANGE if name.startswith("exact") else GREY
        # The factor keeps the label of `contexts with copying` away from the label of `contexts`.
        kept = cost.kept_bytes(640) * (1.15 if name == "contexts with copying" else 1)
        ax.plot([kept] * len(ppls), ppls, color=color, lw=1, marker="")
        ax.plot(kept, ppls[0], "o", ms=6, color=color)
        ax.plot([kept] * len(ppls[1:]), ppls[1:], "o", ms=6, color=color, mfc="white")
        text, x, y = MEMORY_LABELS.get(name, (name, 8, 0))
        place = {"textcoords": "offset points", "va": "center", "ha": "left" if x > 0 else "right"}
        ax.annotate(text, (kept, ppls[0]), (x, y), **place, fontsize=9.5, color=color)
    log_axis(ax, "x", [10.0**n for n in range(2, 7)], ["100 B", "1 kB", "10 kB", "100 kB", "1 MB"])
    log_axis(ax, "y", (150, 200, 300, 400, 500))
    ax.set(xlim=(20, 2e7), xlabel="bytes kept per sequence after 640 tokens")
    ax.set_title("Test perplexity with 50 (filled) and 200 conversations (hollow)")
    return figure


def draw_forest(name: str) -> Any:
    """Draw the differences between the pairs in `PAIRS[name]`. Statistically clear differences are blue."""
    conversations, *pairs = PAIRS[name]
    rows: list[tuple[str, list[Interval]]] = []
    for pair in pairs:
        rows.append((" / ".join(map(label, pair.split(" / "))), []))
        sizes = {size: change(conversations, pair, size) for size in SIZES[conversations]}
        rows += [(f"{size:,}", intervals) for size, intervals in sizes.items() if intervals]
    figure, (ax,) = panels(1, 0.8 + 0.185 * len(rows))
    for y, (text, intervals) in enumerate(rows):
        if not intervals:
            at = {"transform": ax.get_yaxis_transform(), "fontsize": 9.5, "fontweight": "bold"}
            at["bbox"] = {"color": "white", "pad": 0.5}
            ax.text(0.005, y, text.replace("`", ""), va="center", **at)
            continue
        is_clear = intervals[0].low > 0 or intervals[0].high < 0
        look = {"color": BLUE if is_clear else "#9aa1ab"}
        for (_, low, high), width in zip(intervals, (3, 1), strict=False):
            ax.plot([low, high], [y, y], lw=width, marker="", **look)
        ax.plot(intervals[0].percent, y, "o", ms=5, **look)
    ax.axvline(0, color="black", lw=1)
    labels = {y: text for y, (text, intervals) in enumerate(rows) if intervals}
    ax.set_yticks([*labels], [*labels.values()], fontsize=9)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set(ylim=(len(rows) - 0.4, -0.8), ylabel="Training conversations")
    ax.set_title(
        "A / B: how much higher the test perplexity of A is, in %. Left of 0: A is better", fontsize="medium"
    )
    return figure


def used(runs: Sequence[Cell], tokens: Sequence[int]) -> dict[int, Interval]:
    """Compute by how many % perplexity rises if all slots from each distance on read wrong contexts."""
    losses, intervals = np.array([run["losses"] for run in runs]), {}
    for distance in DISTANCES[:-1]:
        nearest = [max(at for at in map(int, run["rises"]) if at <= distance) for run in runs]
        rises = np.array([run["rises"][str(at)] for run, at in zip(runs, nearest, strict=True)])
        intervals[distance] = interval((losses + rises) / 1000, losses / 1000, np.array(tokens))
    return intervals


def draw_evidence() -> Any:
    """Draw, by distance, how well contexts encode tokens and how much the model uses the contexts."""
    results = read("evidence/evidence")
    figure, (above, below) = panels(2, 7)
    lines = (
        ("tuned", 50, BLUE, "D"),
        ("exact", 50, AMBER, "s"),
        ("exact", 100, ORANGE, "o"),
        ("exact", 500, PINK, "^"),
    )
    for place, (recipe, samples, color, marker) in enumerate(lines):
        runs = [run for run in results["runs"] if (run["recipe"], run["samples"]) == (recipe, samples)]
        decoded = np.mean([run["held"] for run in runs], axis=0)
        above.stairs(
            decoded, DISTANCES, baseline=None, lw=2, color=color, ls="-" if place < 2 else (0, (2, place))
        )
        look = {"color": color, "marker": marker, "ms": 4.5, "lw": 1}
        look["label"] = f"{recipe}, {samples} conversations"
        draw_intervals(below, used(runs, results["tokens"]), 1.05 ** (place - 1.5), **look)
    label_end(above, 20, 0.46, "tuned, 50 conversations", BLUE)
    label_end(above, 2, 0.22, "exact: with 50, 100 and 500 the lines coincide", ORANGE)
    above.set(title="Held: R² of a token, decoded from the nearest slot that read it")
    below.set(title="Used: rise of perplexity (%) if slots from here on take other contexts")
    below.legend()
    for ax in (above, below):
        log_axis(ax, "x", DISTANCES)
        ax.set(xlim=(0.85, 700))
    below.set(xlabel="Distance back (tokens)")
    return figure


DRAWN = {
    "study-ngrams": draw_ngrams,
    "study-models": draw_models,
    "study-evidence": draw_evidence,
    "study-memory": draw_memory,
    **{f"study-{name.replace('_', '-')}": lambda name=name: draw_forest(name) for name in PAIRS},
}


def draw_card() -> Any:
    """Draw the preview picture for links to the site, with its name, a sentence and the main result."""
    figure, (ax,) = panels(1, 4.2)
    ax.tick_params(labelsize="small")
    names = ["exact", "kneser_ney", "kneser_ney_caches", "tuned, copying", STRONGEST]
    draw_levels(ax, names, {"tuned, copying": -10, "kneser_ney": 6, "kneser_ney_caches": 8, STRONGEST: -10})
    figure.set(size_inches=(12, 6.3))
    figure.get_layout_engine().set(w_pad=0.25, h_pad=0.25)  # margin in inches
    figure.suptitle("Context-KV attention", x=0.03, ha="left", fontsize=34, fontweight="bold")
    sentence = "attention reads 32 compressed contexts instead of every token\n\n"
    ax.set_title(sentence + ax.get_title(loc="left"), fontsize=18)
    return figure


def for_phone(figure: Any) -> Any:
    """Adapt a figure to a phone: make it narrow, enlarge its letters, and replace labels by a legend."""
    handles = []
    for ax in figure.axes:
        ax.set_title(fill(ax.get_title(loc="left"), 44), loc="left", fontsize=LETTERS)
        ax.tick_params(labelsize=LETTERS)
        handles += handles_of_labels(ax)
        # Hide the label of 1,000 conversations, because there is no room between its neighbours.
        for tick in ax.get_xticklabels():
            tick.set_visible(not tick.get_text().endswith("\n1,000"))
        for name in [text for text in ax.texts if not isinstance(text, Annotation)]:  # names of rows
            ax.set_ylabel("")
            at = blended_transform_factory(figure.transFigure, ax.transData)
            name.set(text=fill(name.get_text(), 46), x=0.01, transform=at, in_layout=False, linespacing=1)
    if handles:
        unique = {handle.get_label(): handle for handle in handles}
        figure.legend(handles=[*unique.values()], loc="outside lower left")
    for text in figure.findobj(Text):
        text.set_fontsize(max(text.get_fontsize(), LETTERS))
    has_rows = any(not isinstance(text, Annotation) for ax in figure.axes for text in ax.texts)
    height = (1.75 if has_rows else 1) * figure.get_figheight() + 0.25 * len(handles)
    figure.set_size_inches(PHONE, height)
    return figure


def handles_of_labels(ax: Any) -> list[Line2D]:
    """Return legend handles for labels. Remove the labels, or turn them into numbers if there are many."""
    handles, labels = [], [text for text in ax.texts if isinstance(text, Annotation)]
    for number, end in enumerate(labels, start=1):
        text, look = end.get_text().replace("\n", " "), {"color": end.get_color()}
        if len(labels) > len(OKABE_ITO):  # too many for different colours
            handles.append(Line2D([], [], ls="", label=f"{number}  {text}"))
            end.set_text(number)
            continue
        lines = [line for line in ax.lines if ends_at(line, end.xy)]
        if lines:
            shown = ("color", "linestyle", "marker", "markersize")
            look = {name: getattr(lines[0], f"get_{name}")() for name in shown}
        handles.append(Line2D([], [], label=text, **look))
        end.remove()
    return handles


def ends_at(line: Any, point: tuple[float, float]) -> bool:
    """Return whether `point` is the last point of a line."""
    return len(line.get_xdata()) > 0 and np.allclose(line.get_xydata()[-1], point)


def draw_all() -> None:
    """Draw all figures of the study's page, for wide screens and for phones, and the preview picture."""
    for name, draw in DRAWN.items():
        draw().savefig(FIGURES / f"{name}.png", dpi=152)
        for_phone(draw()).savefig(FIGURES / f"{name}-narrow.png", dpi=152)
    draw_card().savefig(FIGURES / "card.png", dpi=100)
    plt.close("all")


if __name__ == "__main__":
    draw_all()
