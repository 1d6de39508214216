"""Draw the pictures of the first page, the README and the notebooks: `python notebooks/study/story.py`.

All numbers come from `results/`. Each picture is saved as an SVG file in `notebooks/pictures`.
"""

import re
import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from xml.sax.saxutils import quoteattr

import matplotlib
import nbformat
import numpy as np
from model_map import FILLED, draw_map
from resvg_py import svg_to_bytes
from svg import EXACT, INK, LIGHT, PICTURES, SHOWN, TUNED, Picture
from tables import TOP, Interval, cells_of, change, ppls_of, read, rises, tested

from ctxkv_lib.views.figures import GRAY

NOTEBOOKS = TOP / "notebooks"
sys.path.append(str(NOTEBOOKS))
from outputs import fewer_colors  # noqa: E402

IMAGE = re.compile(r'<img width=.*?">')
LEFT, RIGHT = 14, 366  # edges of strips and axes; labels of ticks at the ends need the margins
WINDOW = 640  # tokens
# The most frequent token is correct at this share of positions. Tokens with a lower share are left blank.
BLANK = 0.005
# Number of training conversations in the waterfall chart.
SIZE = 50
# Number of extra conversations that the token table of `tuned` is made from.
EXTRA = 1_000
# Number of training conversations in the comparison of contexts with alternatives.
MANY = 200
BOLD = {"font_weight": 600}
# Name, change in percent (None in a heading), and color.
Row = tuple[str, Interval | None, str]
KEYHOLES = read("keyholes/keyholes")["runs"]


def recovered(recipe: str) -> np.ndarray:
    """Compute how often each token in the window can be recovered from the nearest slot that has read it.

    Returns:
        shares between 0 and 1, `[seeds, 640]`. Column 0 is the current token.
    """
    back, rows = np.arange(WINDOW), []
    for run in (run for run in KEYHOLES if run["recipe"] == recipe):
        offsets = np.array(run["offsets"])
        nearest = offsets[np.searchsorted(offsets, back, side="right") - 1]
        rows.append(np.interp(back - nearest, run["distance"], run["recovered"]))
    return np.array(rows)


def draw_keyholes() -> Picture:
    """Draw the window of `exact` as a strip. A token that is recovered more often has a stronger color."""
    shares = recovered("exact").mean(axis=0)
    picture = Picture(
        150,
        f"The last {WINDOW} tokens as a strip, the current token at the right: 32 narrow flares, one before "
        f"each slot, and blanks between. Only {shares.sum():.0f} of the tokens can be recovered.",
    )
    picture.text(LEFT, 16, f"{shares.sum():.0f} of the last {WINDOW} tokens can be recovered", **BOLD)
    draw_strip(picture, 52, shares, linear_place, EXACT)
    x = [RIGHT - (RIGHT - LEFT) * linear_place(back + 0.5) for back in (160, 250)]
    for place, words in zip(x, ("a slot", "what is lost"), strict=True):
        picture.arrow((place, 40), (place, 51))
        picture.text(place, 36, words, text_anchor="start" if words == "a slot" else "end")
    ticks = {600: "600", 400: "400 tokens back", 200: "200", 0: "now"}
    label_axis(picture, 104, ticks, linear_place)
    picture.text(LEFT, 140, "Color: how often the token can be recovered")
    return picture


def linear_place(back: float) -> float:
    return back / WINDOW


def draw_strip(
    picture: Picture, y: float, shares: np.ndarray, place: Callable[[float], float], color: str
) -> None:
    """Draw the window's tokens. `place` maps a distance back to 0 (at the right) up to 1 (at the left)."""
    width, back = RIGHT - LEFT, 0
    for share, alike in groupby(shares.round(3).tolist()):
        start, back = back, back + len(list(alike))
        left, right = (RIGHT - width * place(edge) for edge in (back, start))
        if share > BLANK:
            picture.rect(left, y, right - left, 40, color, fill_opacity=share)
    picture.rect(LEFT, y, width, 40, stroke=INK)


def label_axis(picture: Picture, y: float, ticks: dict[int, str], place: Callable[[float], float]) -> None:
    """Draw ticks below a strip and label them with distances."""
    for back, words in ticks.items():
        x = RIGHT - (RIGHT - LEFT) * place(back + 0.5)
        picture.line((x, y - 12), (x, y - 7))
        picture.text(x, y + 6, words, text_anchor="middle")


def draw_waterfall() -> Picture:
    """Draw by how much each part of `tuned` lowers the test perplexity with 50 conversations."""
    levels = waterfall()
    ngrams = mean(ppls_of(tested(10), "kneser_ney_table_caches", SIZE))
    steps = [f"{name}: {value:.0f}" for name, value in levels.items()]
    picture = Picture(
        346,
        f"Test perplexity with {SIZE} conversations, step by step. {'; '.join(steps)}. Dashed: n-grams with "
        f"the same {SIZE + EXTRA:,} conversations, {ngrams:.0f}.",
    )
    high = max(levels.values())

    def at(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * value / high

    picture.text(LEFT, 16, f"Test perplexity, {SIZE} conversations", **BOLD)
    before = high
    for row, (name, value) in enumerate(levels.items()):
        y, is_first = 30 + 50 * row, row == 0
        weight = BOLD if name == "contexts" else {}
        picture.text(LEFT, y + 12, name, **weight)
        change = "" if is_first else f"−{1 - value / before:.0%} to "
        picture.text(RIGHT, y + 12, f"{change}{value:.0f}", text_anchor="end", **weight)
        color = EXACT if is_first else TUNED
        left, right = (0, value) if is_first else (value, before)
        opacity = 1 if is_first or name == "contexts" else 0.4
        picture.rect(at(left), y + 18, at(right) - at(left), 22, color, fill_opacity=opacity)
        if not is_first:
            picture.line((at(value), y + 40), (at(value), y + 68), stroke_dasharray="2 3")
        picture.line((at(ngrams), y + 17), (at(ngrams), y + 41), width=2, stroke_dasharray="5 3")
        before = value
    y = 30 + 50 * len(levels)
    picture.rect(LEFT, y + 18, at(before) - LEFT, 22, TUNED)
    picture.text(LEFT, y + 12, "recipe tuned", **BOLD)
    picture.text(RIGHT, y + 12, f"{before:.0f}", text_anchor="end", **BOLD)
    picture.line((at(ngrams), y + 17), (at(ngrams), y + 41), width=2, stroke_dasharray="5 3")
    picture.text(LEFT, y + 62, f"Dashed: n-grams, same {SIZE + EXTRA:,} conversations: {ngrams:.0f}")
    return picture


def waterfall() -> dict[str, float]:
    """Return the mean test perplexity after each step from `exact` to `tuned`."""
    bare = cells_of("baselines/sweep")
    rows = {
        "recipe exact": (tested(10), "exact"),
        "with the token table of tuned": (tested(10), "exact, directional table"),
        "all else in tuned but contexts": (bare, "no contexts"),
        "contexts": (tested(10), "tuned"),
        "copying": (tested(10), "tuned, copying"),
    }
    return {name: mean(ppls_of(cells, variant, SIZE)) for name, (cells, variant) in rows.items()}


def draw_objective() -> Picture:
    """Draw the loss of Phase 1 for noise, trained contexts, and contexts of an untrained block."""
    runs = [run["losses"] for run in KEYHOLES if run["recipe"] == "exact"]
    names = {"untrained": "untrained block", "trained": "after Phase 1", "noise": "random noise"}
    values = {name: [run[key] for run in runs] for key, name in names.items()}
    told = ", ".join(f"{name} {mean(each):.2f}" for name, each in values.items())
    picture = Picture(214, f"Loss of Phase 1, lower is better: {told}.".replace("-", "−"))
    picture.text(LEFT, 16, "Loss of Phase 1 (lower is better)", **BOLD)
    low, high = -0.6, max(map(max, values.values()))

    def at(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT - 2) * (value - low) / (high - low), 1)

    for row, (name, each) in enumerate(values.items()):
        y, value = 30 + 50 * row, mean(each)
        picture.text(LEFT, y + 12, name)
        picture.text(RIGHT, y + 12, f"{value:.2f}".replace("-", "−"), text_anchor="end", **BOLD)
        color = LIGHT if name == "random noise" else EXACT
        picture.rect(min(at(0), at(value)), y + 20, abs(at(value) - at(0)), 16, color)
        for seed in each:
            picture.add("circle", cx=at(seed), cy=y + 28, r=4, fill=INK, stroke="#ffffff")
        picture.line((at(0), y + 15), (at(0), y + 41))
    picture.text(at(0), 184, "0", text_anchor="middle")
    picture.text(LEFT, 206, "Bars: mean of three seeds. Dots: each seed")
    return picture


def draw_dots(
    title: str, rows: Sequence[Row], ends: tuple[float, float], zero: str = "0: no change"
) -> Picture:
    """Draw changes of the test perplexity in percent: one row for each change, with its 95% interval.

    A row without an interval is a heading.
    """
    told = "; ".join(f"{name} {change_of(each)}" if each else f"{name}:" for name, each, _ in rows)
    heights = [46 if each else 24 for _, each, _ in rows]
    picture = Picture(50 + sum(heights), f"{title}: {told}.")
    picture.text(LEFT, 16, title, **BOLD)
    low, high = ends

    def at(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (value - low) / (high - low), 1)

    y = 28
    for (name, found, color), height in zip(rows, heights, strict=True):
        if found:
            picture.text(LEFT, y + 12, name)
            picture.text(RIGHT, y + 12, signed(found.percent), text_anchor="end", **BOLD)
            picture.line((at(0), y + 18), (at(0), y + 40), width=1.5)
            picture.line((at(found.low), y + 29), (at(found.high), y + 29), stroke=color, width=4)
            picture.add("circle", cx=at(found.percent), cy=y + 29, r=6, fill=color)
        else:
            picture.text(LEFT, y + 16, name, **BOLD)
        y += height
    anchor = "middle" if at(0) < (LEFT + 2 * RIGHT) / 3 else "end"
    picture.text(at(0), y + 14, zero, text_anchor=anchor)
    return picture


def signed(percent: float) -> str:
    """Format a change in percent, with a true minus sign."""
    return f"{percent:+.{0 if abs(percent) >= 10 else 1}f}%".replace("-", "−")


def change_of(found: Interval) -> str:
    return f"{signed(found.percent)} ({signed(found.low)} to {signed(found.high)})"


def draw_present() -> Picture:
    """Draw how the perplexity of `exact` changes if earlier contexts are replaced, or never read."""
    replaced, absent = [], []
    for size in (50, 100, 500):
        replaced.append((f"{size} conversations", rises("exact", size)[1], EXACT))
        absent.append((f"{size} conversations", change(50, "exact, one slot / exact", size)[0], EXACT))
    headings = ("Earlier 31 contexts from another place", "Trained without the earlier 31")
    rows = [(headings[0], None, EXACT), *replaced, (headings[1], None, EXACT), *absent]
    return draw_dots("Change of the perplexity of exact", rows, (-13, 13))


def draw_instead() -> Picture:
    """Draw by how much contexts or alternatives lower the perplexity of a model without contexts."""
    names = {
        "contexts": ("contexts", TUNED),
        "tokens at the same slots": ("tokens at the same 32 slots", GRAY),
        "last 32 tokens": ("the last 32 tokens", GRAY),
        "LSTM": ("an LSTM of the same size", GRAY),
        "GRU": ("a GRU of the same size", GRAY),
    }
    rows = [
        (words, change(50, f"{name} / no contexts", MANY)[0], color) for name, (words, color) in names.items()
    ]
    return draw_dots(
        f"Perplexity with {MANY} conversations", rows, (-36, 4), "0: sees only the current token"
    )


DRAWN: dict[str, Callable[[], Picture]] = {
    "keyholes": draw_keyholes,
    "waterfall": draw_waterfall,
    "objective": draw_objective,
    "present": draw_present,
    "instead": draw_instead,
    **{f"map-{number}": lambda filled=filled: draw_map(filled) for number, filled in FILLED.items()},
}


def embed(path: Path) -> None:
    """Write the pictures of a notebook into its Markdown, where every program finds them.

    A copy of a notebook on Colab has no files beside it, and Colab shows no embedded SVG. So the pictures are
    embedded as PNG. The metadata of a cell name its picture.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if name := cell.metadata.get("picture"):
            picture = DRAWN[name]()
            source = f"data:image/png;base64,{png(picture)}"
            image = f'<img width="{SHOWN}" alt={quoteattr(picture.alternative)} src="{source}">'
            cell.source = IMAGE.sub(lambda _, image=image: image, cell.source)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def png(picture: Picture) -> str:
    """Return a picture as a PNG in base64, with twice the pixels that it has on a page."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # the same on every machine
    options = {"zoom": 2, "font_dirs": [str(fonts)], "skip_system_fonts": True}
    content = svg_to_bytes(picture.svg(), sans_serif_family="DejaVu Sans", **options)
    return fewer_colors(b64encode(content).decode())


def main() -> None:
    """Save all pictures, and embed them in the notebooks."""
    for name, draw in DRAWN.items():
        (PICTURES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
    for path in NOTEBOOKS.glob("*.ipynb"):
        embed(path)


if __name__ == "__main__":
    main()
