"""Draw the figures of the study from its results: `python notebooks/study/figures.py`.

In all figures, `exact` is orange, `tuned` and its contexts are blue, and what they are compared with is grey.
"""

from collections.abc import Sequence
from statistics import mean
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from costs import costs
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
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
    format_bytes,
    losses,
    ppls_of,
    read,
    tested,
)

import ctxkv_lib as ctxkv
from ctxkv_lib.report.difference import Interval, interval
from ctxkv_lib.views.figures import GREY, INK, OKABE_ITO, WIDTH, ink

FIGURES = TOP / "docs" / "_static"
# Width of a figure on a phone, in inches (368 pixels).
PHONE = 4.84
# Smallest font size on a phone, in points (12 pixels).
LETTERS = 11.5
BLUE, ORANGE, _, _, _, SKY, _ = OKABE_ITO
PALE = "#8c959f"  # the lightest grey of a line
STRONGEST = "kneser_ney_table_caches"
LINES: dict[str, dict[str, Any]] = {
    "exact": {"label": "exact", "color": ORANGE, "marker": "s"},
    "tuned": {"label": "tuned without copying", "color": SKY, "marker": "o"},
    "tuned, copying": {"label": "tuned", "color": BLUE, "marker": "D"},
    "kneser_ney": {"label": "n-grams", "color": PALE, "ls": "-.", "marker": ""},
    "kneser_ney_caches": {"label": "n-grams, four caches", "color": GREY, "ls": ":", "marker": ""},
    STRONGEST: {
        "label": "n-grams, four caches,\ntoken table's text",
        "color": INK,
        "ls": "--",
        "marker": "",
    },
}

# For each row: its label, and by how many points the label is shifted to the right and up.
MEMORY_LABELS = {
    "exact, one slot": ("exact, only the current context", 8, 0),
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


def label_end(ax: Any, x: float, y: float, text: str, look: dict[str, Any], shift: float = 0) -> None:
    """Write text next to the right end of a line with this look, shifted up by `shift` points."""
    options = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
    color = ink(look["color"])
    end = ax.annotate(text, (x, y), (8, shift), color=color, fontsize=9.5, **options)
    end.look = look  # for the legend on phones


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
    ax.set(xlabel="Training tokens (above) and conversations (log scale)")


def draw_line(ax: Any, name: str, values: dict[int, float], shift: float) -> None:
    """Draw a line of values by number of conversations, with a label. Hollow points have no interval."""
    tokens, look = tokens_by_size(), {"ms": 5, **LINES[name]}
    ax.plot([tokens[size] for size in values], [*values.values()], **look)
    hollow = [size for size in values if look["marker"] and not losses(10, name, size)]
    points = look | {"mfc": "white", "ls": "none", "zorder": 3}
    ax.plot([tokens[size] for size in hollow], [values[size] for size in hollow], **points)
    label_end(ax, tokens[max(values)], values[max(values)], look["label"], look, shift)


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
    ax.set(ylim=(125, None), title="Test perplexity per token (log scale, lower is better)")


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
    below.axhline(1, color=INK, ls="--")
    ticks = (0.8, 1, 1.5, 2, 3, 4, 6)
    log_axis(below, "y", ticks, [signed_percent(100 * (tick - 1)) for tick in ticks])
    size_axis(below)
    below.set_title("Above the strongest n-grams (dashed; log scale), with 95% intervals")
    return figure


def signed_percent(value: float) -> str:
    """Format a change in per cent, with a true minus sign."""
    return f"{value:+.0f}%".replace("-", "−") if value else "0%"


def draw_models() -> Any:
    """Draw how much higher or lower the test perplexity is with contexts than with their alternatives."""
    figure, (ax,) = panels(1, 4.4)
    looks: dict[str, dict[str, Any]] = {
        "no contexts": {"color": PALE, "marker": "o"},
        "tokens at the same slots": {"color": PALE, "marker": "s", "ls": ":"},
        "last 32 tokens": {"color": GREY, "marker": "D", "ls": "--"},
        "GRU": {"color": INK, "marker": "^"},
        "gated, end to end": {"color": GREY, "marker": "v"},
    }
    ax.axhline(0, color=BLUE, lw=2)
    for place, (name, look) in enumerate(looks.items()):
        points = {size: shown[0] for size in FIFTY if (shown := change(50, f"contexts / {name}", size))}
        end = draw_intervals(ax, points, 1.03 ** (place - 2), ms=5, **look)
        shift = {"tokens at the same slots": -14, "gated, end to end": 9}.get(name, 0)
        text = {"gated, end to end": "gated contexts", "no contexts": "the current token alone"}
        label_end(ax, *end, text.get(name, name), look, shift)
    log_axis(ax, "x", FIFTY)
    ax.set(xlabel="Training conversations (log scale)")
    ax.set_title("Test perplexity of contexts (blue line) compared with each model (%), 95% intervals")
    return figure


def memory_points() -> list[tuple[str, str, float, list[float]]]:
    """Return name, colour, bytes kept after 640 tokens, and perplexities with 50 and 200 conversations."""
    points = []
    for name, cost in costs().items():
        ppls = [mean(found) for size in (50, 200) if (found := ppls_of(tested(50), name, size))]
        color = BLUE if name.startswith("contexts") else ORANGE if name.startswith("exact") else GREY
        if ppls:
            points.append((name, color, cost.kept_bytes(640), ppls))
    return points


def draw_memory() -> Any:
    """Draw test perplexity by the number of bytes that a model keeps after reading 640 tokens."""
    figure, (ax,) = panels(1, 4.8)
    for name, color, kept, ppls in memory_points():
        # The factor keeps the label of `contexts with copying` away from the label of `contexts`.
        x = kept * (1.15 if name == "contexts with copying" else 1)
        ax.plot([x] * len(ppls), ppls, color=color, lw=1, marker="")
        draw_dots(ax, [x] * len(ppls), ppls, color)
        text, right, up = MEMORY_LABELS.get(name, (name, 8, 0))
        place = {"textcoords": "offset points", "va": "center", "ha": "left" if right > 0 else "right"}
        ax.annotate(text, (x, ppls[0]), (right, up), **place, fontsize=9.5, color=ink(color))
    log_axis(ax, "x", [10.0**n for n in range(2, 7)], ["100 B", "1 kB", "10 kB", "100 kB", "1 MB"])
    log_axis(ax, "y", (150, 200, 300, 400, 500))
    ax.set(xlim=(20, 2e7), xlabel="Memory per sequence after 640 tokens (log scale)")
    ax.set_title("Test perplexity with 50 (filled) and 200 conversations (hollow), log scale")
    return figure


def draw_memory_on_phone() -> Any:
    """Draw the same with one row per model, because a phone has no room for labels next to points."""
    points = sorted(memory_points(), key=lambda point: point[2])
    figure, (ax,) = panels(1, 1.4 + 0.44 * len(points))
    for y, (name, color, kept, ppls) in enumerate(points):
        ax.plot(ppls, [y] * len(ppls), color=color, lw=1, marker="")
        draw_dots(ax, ppls, [y] * len(ppls), color)
        text = f"{label(name).replace('`', '')}: {format_bytes(round(kept))}"
        ax.text(0.01, y - 0.42, text, va="center", color=ink(color), transform=ax.get_yaxis_transform())
    log_axis(ax, "x", (150, 200, 300, 400, 500))
    ax.set(yticks=[], ylim=(len(points) - 0.5, -0.9), xlabel="Test perplexity (log scale)")
    ax.set_title("Memory after 640 tokens; test perplexity with 50 (filled) and 200 conversations (hollow)")
    return figure


def draw_dots(ax: Any, xs: Sequence[float], ys: Sequence[float], color: str) -> None:
    """Draw a filled point, and hollow points after it."""
    ax.plot(xs[0], ys[0], "o", ms=6, color=color)
    ax.plot(xs[1:], ys[1:], "o", ms=6, color=color, mfc="white")


def draw_forest(name: str, letters: float = 9, columns: int = 110) -> Any:
    """Draw the differences between the pairs in `PAIRS[name]`, with a group of rows for each pair.

    Args:
        letters: font size of the rows.
        columns: largest number of letters in a line of a heading.
    """
    conversations, *pairs = PAIRS[name]
    figure, (ax,) = panels(1, 1)
    ticks, y = {}, 0.0
    for pair in pairs:
        heading = fill(" / ".join(map(label, pair.split(" / "))).replace("`", ""), columns)
        lines = heading.count("\n") + 1
        at = {"transform": ax.get_yaxis_transform(), "va": "center", "linespacing": 1}
        at |= {"fontsize": letters + 0.5, "fontweight": "bold", "bbox": {"color": "white", "pad": 0.5}}
        ax.text(0.005, y + (lines - 1) / 2, heading, **at)
        y += lines
        for size in SIZES[conversations]:
            if intervals := change(conversations, pair, size):
                draw_row(ax, y, intervals, color_of(label(pair.split(" / ")[0])))
                ticks[y] = f"{size:,}"
                y += 1
        y += 0.6  # space between groups
    figure.set_figheight(1.15 + 0.02 * (letters + 0.6) * y)
    ax.axvline(0, color=INK, lw=1)
    ax.set_yticks([*ticks], [*ticks.values()], fontsize=letters)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set(ylim=(y - 0.6, -1), ylabel="Training conversations")
    ax.xaxis.set_major_formatter(lambda value, _: signed_percent(value))
    ax.set_title(
        "A / B: how much higher the test perplexity of A is. Left of 0: A is better", fontsize="medium"
    )
    line = {"color": GREY, "marker": ""}
    handles = [
        Line2D([], [], ls="", marker="o", ms=5, color=GREY, label="statistically clear"),
        Line2D([], [], ls="", marker="o", ms=5, color=GREY, mfc="white", label="a tie"),
        Line2D([], [], lw=3, label="95% interval", **line),
        Line2D([], [], lw=1, label="the same for groups of speakers", **line),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=2 if columns < 80 else 4)
    return figure


def draw_row(ax: Any, y: float, intervals: Sequence[Interval], color: str) -> None:
    """Draw a difference with its intervals. The point is filled if the difference is statistically clear."""
    is_clear = intervals[0].low > 0 or intervals[0].high < 0
    for (_, low, high), width in zip(intervals, (3, 1), strict=False):
        ax.plot([low, high], [y, y], lw=width, marker="", color=color)
    ax.plot(intervals[0].percent, y, "o", ms=5, color=color, mfc=color if is_clear else "white")


def color_of(name: str) -> str:
    """Return the colour of a row of the study."""
    if name.startswith("`exact`"):
        return ORANGE
    return BLUE if name.startswith(("`tuned`", "contexts", "random init")) else GREY


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
        ("exact", 50, "#f0a36b", "s"),  # a light and a dark shade of orange
        ("exact", 100, ORANGE, "o"),
        ("exact", 500, "#8a3d00", "^"),
    )
    for place, (recipe, samples, color, marker) in enumerate(lines):
        runs = [run for run in results["runs"] if (run["recipe"], run["samples"]) == (recipe, samples)]
        decoded = np.mean([run["held"] for run in runs], axis=0)
        # The lines of `exact` coincide, so they have the same colour here.
        above.stairs(decoded, DISTANCES, baseline=None, lw=2, color=BLUE if recipe == "tuned" else ORANGE)
        look = {"color": color, "marker": marker, "ms": 4.5, "lw": 1}
        look["label"] = f"{recipe}, {samples} conversations"
        draw_intervals(below, used(runs, results["tokens"]), 1.05 ** (place - 1.5), **look)
    above.text(24, 0.6, "tuned, 50 conversations", ha="right", va="center", color=ink(BLUE))
    above.text(600, -0.05, "exact, with 50, 100 and 500", va="center", color=ink(ORANGE))
    above.set(ylim=(-0.1, None), title="Held: R² of a token, decoded from the nearest slot that read it")
    below.set(title="Used: rise of perplexity (%) if slots from here on take other contexts")
    below.legend(loc="upper left")
    for ax in (above, below):
        log_axis(ax, "x", DISTANCES)
        ax.set(xlim=(700, 0.85))  # the current token is at the right
    below.set(xlabel="Tokens back (log scale)")
    return figure


FORESTS = {f"study-{name.replace('_', '-')}": name for name in PAIRS}
DRAWN = {
    "study-ngrams": draw_ngrams,
    "study-models": draw_models,
    "study-evidence": draw_evidence,
    "study-memory": draw_memory,
    **{file: lambda name=name: draw_forest(name) for file, name in FORESTS.items()},
}
# Figures that are drawn in another way for phones.
DRAWN_FOR_PHONES = {
    "study-memory": draw_memory_on_phone,
    **{file: lambda name=name: draw_forest(name, LETTERS, 42) for file, name in FORESTS.items()},
}


def draw_card() -> Any:
    """Draw the preview picture for links to the site: its name, the main finding, and a picture of it."""
    names = {
        "no contexts": "the current token alone",
        "contexts": "contexts",
        "last 32 tokens": "the last 32 tokens",
        "LSTM": "an LSTM of the same size",
        "GRU": "a GRU of the same size",
    }
    figure, (ax,) = panels(1, 4.2)
    for y, name in enumerate(names):
        ppl = mean(ppls_of(tested(50), name, 200))
        ax.barh(y, ppl, height=0.66, color=BLUE if name == "contexts" else PALE)
        ax.text(ppl + 2, y, f"{ppl:.0f}", va="center", fontsize=20)
    ax.set_yticks(range(len(names)), [*names.values()], fontsize=20)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 230), xticks=[])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
    figure.set(size_inches=(12, 6.3))
    figure.get_layout_engine().set(w_pad=0.4, h_pad=0.35)  # margin in inches
    figure.suptitle("Context-KV attention", x=0.035, ha="left", fontsize=26)
    finding = "Contexts help, but simpler models do as well"
    figure.text(0.035, 0.8, finding, fontsize=36, fontweight="bold", in_layout=False)
    ax.set_title("\n\n\nTest perplexity with 200 training conversations (lower is better)", fontsize=20)
    return figure


def for_phone(figure: Any) -> Any:
    """Adapt a figure to a phone: make it narrow, enlarge its letters, and write labels into a legend."""
    handles = []
    for ax in figure.axes:
        ax.set_title(fill(ax.get_title(loc="left"), 46), loc="left", fontsize=LETTERS)
        ax.tick_params(labelsize=LETTERS)
        # Hide the label of 1,000 conversations, because there is no room between its neighbours.
        for tick in ax.get_xticklabels():
            tick.set_visible(not tick.get_text().endswith("\n1,000"))
        for end in [text for text in ax.texts if isinstance(text, Annotation)]:
            handles.append(Line2D([], [], **{**end.look, "label": end.get_text().replace("\n", " ")}))
            end.remove()
    if handles:
        unique = {handle.get_label(): handle for handle in handles}
        figure.legend(handles=[*unique.values()], loc="outside lower left")
    for text in figure.findobj(Text):
        text.set_fontsize(max(text.get_fontsize(), LETTERS))
    figure.set_size_inches(PHONE, figure.get_figheight() + 0.25 * len(handles))
    return figure


def draw_all() -> None:
    """Draw all figures of the study's page, for wide screens and for phones, and the preview picture."""
    for name, draw in DRAWN.items():
        draw().savefig(FIGURES / f"{name}.png", dpi=152)
        on_phone = for_phone(DRAWN_FOR_PHONES.get(name, draw)())
        on_phone.savefig(FIGURES / f"{name}-narrow.png", dpi=152)
    draw_card().savefig(FIGURES / "card.png", dpi=100)
    plt.close("all")


if __name__ == "__main__":
    draw_all()
