"""Draw the figures of the study from its results: `python notebooks/study/figures.py`.

In all figures, `exact` is orange, `tuned` and its contexts are blue, and what they are compared with is gray.
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
    TOP,
    change,
    format_bytes,
    ppls_of,
    read,
    rises,
    tested,
)

import ctxkv_lib as ctxkv
from ctxkv_lib.report.difference import Interval
from ctxkv_lib.views.figures import GRAY, INK, OKABE_ITO, WIDTH, ink

FIGURES = TOP / "docs" / "_static"
# Width of a figure on a phone, in inches (368 pixels).
PHONE = 4.84
# Smallest font size on a phone, in points (12 pixels).
LETTERS = 11.5
BLUE, ORANGE, _, _, _, SKY, _ = OKABE_ITO
PALE = "#8c959f"  # the lightest gray of a line
OTHER = {"color": GRAY, "marker": "o"}  # models that are compared with ours
STRONGEST = "kneser_ney_table_caches"
LINES: dict[str, dict[str, Any]] = {
    "exact": {"label": "exact", "color": ORANGE, "marker": "s"},
    "contexts": {"label": "context model", "color": SKY, "marker": "o"},
    "contexts with copying": {"label": "context model\nwith copying", "color": BLUE, "marker": "D"},
    "kneser_ney": {"label": "n-grams", "color": PALE, "ls": "-.", "marker": ""},
    "kneser_ney_caches": {"label": "n-grams, four caches", "color": GRAY, "ls": ":", "marker": ""},
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
    "contexts": ("context model", -8, 6),
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
    return {size: tested(50)["exact", size][0]["train_tokens"] for size in FIFTY}


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
    """Draw a line of values by number of conversations, with a label at its end."""
    tokens, look = tokens_by_size(), {"ms": 5, **LINES[name]}
    ax.plot([tokens[size] for size in values], [*values.values()], **look)
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
    return {size: mean(ppls_of(tested(50), name, size)) for size in FIFTY}


def draw_levels(ax: Any, names: Sequence[str], shifts: dict[str, float]) -> None:
    """Draw test perplexity by training tokens. `shifts` says by how many points to move labels up."""
    for name in names:
        draw_line(ax, name, levels_of(name), shifts.get(name, 0))
    log_axis(ax, "y", (150, 200, 300, 500, 700, 1_000))
    size_axis(ax)
    ax.set(ylim=(85, None), title="Test perplexity per token (log scale, lower is better)")


def draw_ngrams() -> Any:
    """Draw test perplexity by training tokens: its value, and its ratio to the strongest n-grams."""
    figure, (above, below) = panels(2, 8.4)
    shifts = {"contexts": 9, STRONGEST: -9, "contexts with copying": -25}
    draw_levels(above, [*LINES], shifts)
    tokens, strongest = tokens_by_size(), levels_of(STRONGEST)
    for name in ("exact", "kneser_ney_caches", "contexts", "contexts with copying"):
        ratios = {size: ppl / strongest[size] for size, ppl in levels_of(name).items()}
        draw_line(below, name, ratios, {"contexts": 4, "contexts with copying": -9}.get(name, 0))
        changes = {tokens[size]: change(50, f"{name} / {STRONGEST}", size)[0] for size in FIFTY}
        _, low, high = 1 + np.array([*changes.values()]).T / 100
        below.fill_between([*changes], low, high, color=LINES[name]["color"], alpha=0.15, lw=0)
    below.axhline(1, color=INK, ls="--")
    ticks = (0.8, 1, 1.5, 2, 3, 4, 6)
    log_axis(below, "y", ticks, [signed_percent(100 * (tick - 1)) for tick in ticks])
    size_axis(below)
    below.set(ylim=(0.65, None))
    below.set_title("Above the strongest n-grams (dashed; log scale), with 95% intervals")
    return figure


def signed_percent(value: float) -> str:
    """Format a change in percent, with a true minus sign."""
    return f"{value:+.0f}%".replace("-", "−") if value else "0%"


def draw_models() -> Any:
    """Draw how much higher or lower the test perplexity of alternatives is than that of the context model."""
    figure, (ax,) = panels(1, 4.4)
    looks: dict[str, dict[str, Any]] = {
        "no contexts": {"color": PALE, "marker": "o"},
        "tokens at the same slots": {"color": PALE, "marker": "s", "ls": ":"},
        "last 32 tokens": {"color": GRAY, "marker": "D", "ls": "--"},
        "GRU": {"color": INK, "marker": "^"},
        "gated, end to end": {"color": GRAY, "marker": "v"},
    }
    ax.axhline(0, color=BLUE, lw=2)
    for place, (name, look) in enumerate(looks.items()):
        points = {size: shown[0] for size in FIFTY if (shown := change(50, f"{name} / contexts", size))}
        end = draw_intervals(ax, points, 1.03 ** (place - 2), ms=5, **look)
        shift = {"tokens at the same slots": 9, "gated, end to end": -9}.get(name, 0)
        label_end(ax, *end, label(name), look, shift)
    log_axis(ax, "x", FIFTY)
    ax.set(xlabel="Training conversations (log scale)")
    ax.yaxis.set_major_formatter(lambda value, _: signed_percent(value))
    ax.set_title("Test perplexity compared with the context model (blue line), 95% intervals")
    return figure


def memory_points() -> list[tuple[str, dict[str, Any], float, list[float]]]:
    """Return name, look, bytes kept after 640 tokens, and perplexities with 50 and 200 conversations."""
    points = []
    for name, cost in costs().items():
        ppls = [mean(found) for size in (50, 200) if (found := ppls_of(tested(50), name, size))]
        line = LINES.get(name.removesuffix(", one slot"), {})
        look = {key: line[key] for key in ("color", "marker")} if line.get("marker") else OTHER
        if ppls:
            points.append((name, look, cost.kept_bytes(640), ppls))
    return points


def draw_memory() -> Any:
    """Draw test perplexity by the number of bytes that a model keeps after reading 640 tokens."""
    figure, (ax,) = panels(1, 4.8)
    for name, look, kept, ppls in memory_points():
        draw_dots(ax, [kept] * len(ppls), ppls, look)
        text, right, up = MEMORY_LABELS.get(name, (name, 8, 0))
        place = {"textcoords": "offset points", "va": "center", "ha": "left" if right > 0 else "right"}
        ax.annotate(text, (kept, ppls[0]), (right, up), **place, fontsize=9.5, color=ink(look["color"]))
    log_axis(ax, "x", [10.0**n for n in range(2, 7)], ["100 B", "1 kB", "10 kB", "100 kB", "1 MB"])
    log_axis(ax, "y", (150, 200, 300, 400, 500))
    ax.set(xlim=(20, 2e7), xlabel="Memory per sequence after 640 tokens (log scale)")
    ax.set_title("Test perplexity with 50 (filled) and 200 conversations (hollow), log scale")
    return figure


def draw_memory_on_phone() -> Any:
    """Draw the same with one row per model, because a phone has no room for labels next to points."""
    points = sorted(memory_points(), key=lambda point: point[2])
    figure, (ax,) = panels(1, 1.4 + 0.44 * len(points))
    for y, (name, look, kept, ppls) in enumerate(points):
        draw_dots(ax, ppls, [y] * len(ppls), look)
        text = f"{label(name).replace('`', '')}: {format_bytes(round(kept))}"
        place = {"va": "center", "transform": ax.get_yaxis_transform()}
        ax.text(0.01, y - 0.42, text, color=ink(look["color"]), **place)
    log_axis(ax, "x", (150, 200, 300, 400, 500))
    ax.set(yticks=[], ylim=(len(points) - 0.5, -0.9), xlabel="Test perplexity (log scale)")
    ax.set_title("Memory after 640 tokens; test perplexity with 50 (filled) and 200 conversations (hollow)")
    return figure


def draw_dots(ax: Any, xs: Sequence[float], ys: Sequence[float], look: dict[str, Any]) -> None:
    """Draw a filled point, hollow points after it, and a line through all of them."""
    ax.plot(xs, ys, lw=1, marker="", color=look["color"])
    ax.plot(xs[0], ys[0], ls="", ms=6, **look)
    ax.plot(xs[1:], ys[1:], ls="", ms=6, mfc="white", **look)


def draw_forest(name: str, letters: float = 9, columns: int = 110) -> Any:
    """Draw the differences between the pairs on the study's page in `PAIRS[name]`, one group for each pair.

    Args:
        letters: font size of the rows.
        columns: largest number of letters in a line of a heading.
    """
    pairs, _ = PAIRS[name]
    figure, (ax,) = panels(1, 1)
    ticks, y = {}, 0.0
    for pair in pairs:
        heading = fill(" / ".join(map(label, pair.split(" / "))).replace("`", ""), columns)
        lines = heading.count("\n") + 1
        at = {"transform": ax.get_yaxis_transform(), "va": "center", "linespacing": 1}
        at |= {"fontsize": letters + 0.5, "fontweight": "bold", "bbox": {"color": "white", "pad": 0.5}}
        ax.text(0.005, y + (lines - 1) / 2, heading, **at)
        y += lines
        for size in FIFTY:
            if intervals := change(50, pair, size):
                draw_row(ax, y, intervals[0], color_of(heading))
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
    line = {"color": GRAY, "marker": ""}
    handles = [
        Line2D([], [], ls="", marker="o", ms=5, color=GRAY, label="statistically clear"),
        Line2D([], [], ls="", marker="o", ms=5, color=GRAY, mfc="white", label="the interval includes zero"),
        Line2D([], [], lw=3, label="95% interval", **line),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=2 if columns < 80 else 3)
    return figure


def draw_row(ax: Any, y: float, found: Interval, color: str) -> None:
    """Draw a difference with its interval. The point is filled if the difference is statistically clear."""
    is_clear = found.low > 0 or found.high < 0
    ax.plot([found.low, found.high], [y, y], lw=3, marker="", color=color, solid_capstyle="butt")
    ax.plot(found.percent, y, "o", ms=5, color=color, mfc=color if is_clear else "white")


def color_of(heading: str) -> str:
    """Return the color of a pair: orange if it contains `exact`, and gray if it starts with a baseline."""
    if "exact" in heading:
        return ORANGE
    return BLUE if heading.startswith(("tuned", "context model", "predictive")) else GRAY


def draw_evidence() -> Any:
    """Draw, by distance, how well contexts encode tokens and how much the model uses the contexts."""
    runs = read("evidence/evidence")["runs"]
    figure, (above, below) = panels(2, 7)
    lines = (
        ("tuned", 50, BLUE, "D"),
        ("exact", 50, "#f0a36b", "s"),  # a light and a dark shade of orange
        ("exact", 100, ORANGE, "o"),
        ("exact", 500, "#8a3d00", "^"),
    )
    for place, (recipe, samples, color, marker) in enumerate(lines):
        held = [run["held"] for run in runs if (run["recipe"], run["samples"]) == (recipe, samples)]
        decoded = np.mean(held, axis=0)
        # The lines of `exact` coincide, so they have the same color here.
        above.stairs(decoded, DISTANCES, baseline=None, lw=2, color=BLUE if recipe == "tuned" else ORANGE)
        look = {"color": color, "marker": marker, "ms": 4.5, "lw": 1}
        look["label"] = f"{recipe}, {samples} conversations"
        draw_intervals(below, rises(recipe, samples), 1.05 ** (place - 1.5), **look)
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


FORESTS = {f"study-{name}": f"beside_{name}" for name in ("alternatives", "phase1", "proposals")}
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
