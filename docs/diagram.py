"""Draws the pictures of the architecture and of the packages, for README and reference: `make picture`.

Coordinates are inches on the page, so that lengths and font sizes (points) stay in proportion.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from ctxkv_lib.method.config import GPT2_VOCAB_SIZE, ModelConfig
from ctxkv_lib.method.model import ContextKV
from ctxkv_lib.method.windows import Window
from ctxkv_lib.runs.models import parameter_counts
from ctxkv_lib.views.axes import INK, OKABE_ITO, PAPER, QUIET, RULE, save

FROZEN, PHASE1, PHASE2, PASSED = QUIET, "#00835f", OKABE_ITO[0], "#b9bec7"
PAGE = (10.2, 6.75)
LEFT, RIGHT, NOTES = 0.35, 6.75, 6.95
COLUMNS = (0.85, 3.15, 4.65, 6.15)  # x of the oldest slot, then of the three newest
MIDDLE = (LEFT + RIGHT) / 2

# Packages from the bottom up with their one job, and what the data becomes there.
PACKAGES = {
    "method": ("the published method and exact contexts", ("contexts", "caches", "metrics")),
    "data": ("conversations, tokens, token tables", ("conversations", "tokens")),
    "hf": ("the transformers model and its cache", ("model folder",)),
    "runs": ("stages, run folders, settings", ("run folder",)),
    "views": ("figures, live curves, explorers", ("figures",)),
    "report": ("the written report, in two languages", ("report", "model card")),
    "measure": ("n-gram baselines, probe of contexts", ("n-grams", "probe")),
}
LAYER_STEP, LAYER_HEIGHT = 0.79, 0.67
STATIONS = (6.0, 7.5, 9.0)  # x of the middles of what the data becomes


def architecture(model: ModelConfig) -> Figure:
    """The whole model in one picture, from tokens (bottom) to the next token (top); numbers from `model`."""
    figure, ax = _page()
    columns = _columns(model)
    _draw_tokens(ax, model, columns)
    _draw_contexts(ax, columns)
    _draw_tower(ax, model)
    _draw_notes(ax, model)
    _draw_caption(ax, model)
    return figure


def packages() -> Figure:
    """The packages as layers, each of which imports only from those below it."""
    figure, ax = _page()
    _text(ax, LEFT, 6.4, "The packages of ctxkv_lib", size=18, weight="bold", ha="left")
    _text(ax, LEFT, 6.0, "A package imports only from packages below it.", size=12.5, ha="left")
    for number, (name, (job, made)) in enumerate(PACKAGES.items()):
        y = 0.5 + LAYER_STEP * number
        _box(ax, PAGE[0] / 2, y, PAGE[0] - 2 * LEFT, LAYER_HEIGHT, RULE)
        _text(ax, LEFT + 0.15, y, f"{name}/", ha="left", weight="bold")
        _text(ax, LEFT + 1.25, y, job, ha="left")
        for x, what in zip(STATIONS, made, strict=False):
            colour = PHASE1 if what == "contexts" else PHASE2
            width = 1.35 if len(made) > 1 else 2.0
            _box(ax, x + (width - 1.35) / 2, y, width, 0.34, colour)
            _text(ax, x + (width - 1.35) / 2, y, what, size=10, color=PAPER, weight="bold")
    return figure


def part_sizes(model: ModelConfig) -> dict[str, int]:
    """Parameters of each part of the Context-KV model; they add up to its total."""
    with torch.device("meta"):
        parts = ContextKV(model).named_children()
    return {name: parameter_counts(part)["total"] for name, part in parts}


def _columns(model: ModelConfig) -> list[tuple[float, int]]:
    """(x, tokens back) of the slots drawn: the oldest and up to three newest, left to right."""
    slots = sorted({0, 1, 2, model.max_contexts - 1} & set(range(model.max_contexts)), reverse=True)
    offsets = Window(model).offsets
    return [(x, offsets[slot]) for x, slot in zip(COLUMNS[-len(slots) :], slots, strict=True)]


def _draw_tokens(ax: Axes, model: ModelConfig, columns: list[tuple[float, int]]) -> None:
    """Tokens, and what every one of them goes through: table, then norm."""
    for x, back in columns:
        _box(ax, x, 0.95, 0.26, 0.26, INK)
        _text(ax, x, 0.63, f"i − {back}" if back else "i", weight="bold")
        _arrow(ax, (x, 1.1), (x, 1.42))
    for (start, _), (end, _) in pairwise(columns):
        for x in _between(start, end):
            _box(ax, x, 0.95, 0.15, 0.15, PASSED)
        _text(ax, (start + end) / 2, 0.97, "…", size=15, color=QUIET)
    if len(columns) > 1:
        _span(ax, COLUMNS[-2], COLUMNS[-1], 0.38, f"{model.interval} tokens")
    _box(ax, MIDDLE, 1.65, RIGHT - LEFT, 0.46, FROZEN)
    table = f"Token table  {GPT2_VOCAB_SIZE:,} × {model.hidden_size:,}   →   LayerNorm"
    _text(ax, MIDDLE, 1.65, table, color=PAPER, weight="bold")


def _draw_contexts(ax: Axes, columns: list[tuple[float, int]]) -> None:
    """The recurrence from left to right, and the contexts that it leaves one `interval` apart."""
    _arrow(ax, (columns[0][0] - 0.7, 2.58), (columns[0][0] - 0.4, 2.58), PHASE1)
    _text(ax, columns[0][0] + 0.12, 3.76, "keys and values", color=PHASE2, ha="left")
    for x, _ in columns:
        _arrow(ax, (x, 1.88), (x, 2.32))
        _box(ax, x, 2.58, 0.78, 0.5, PHASE1)
        _text(ax, x, 2.57, "Context\nBlock", size=10, color=PAPER, weight="bold", linespacing=1.1)
        _arrow(ax, (x, 2.83), (x, 3.15), PHASE1)
        _context(ax, x, 3.31)
        _arrow(ax, (x, 3.48), (x, 4.02), PHASE2)
    for (start, _), (end, _) in pairwise(columns):
        ax.plot([start + 0.39, end - 0.55], [2.58] * 2, color=PHASE1, lw=1.8, ls=(0, (1, 1.6)))
        _arrow(ax, (end - 0.6, 2.58), (end - 0.4, 2.58), PHASE1)
    if len(columns) == len(COLUMNS):
        _text(ax, (COLUMNS[0] + COLUMNS[1]) / 2, 3.31, "…", size=18, color=PHASE1)


def _draw_tower(ax: Axes, model: ModelConfig) -> None:
    """Attention over the slots, then the feed-forward layer and the tied head, at position i."""
    query, top = COLUMNS[-1] + 0.49, RIGHT - 0.8
    _arrow(ax, (query, 1.88), (query, 4.02), PHASE2)
    _text(ax, query + 0.1, 3.76, "query", color=PHASE2, ha="left")
    _box(ax, MIDDLE, 4.28, RIGHT - LEFT, 0.5, PHASE2)
    attention = f"Context-KV attention   {model.num_heads} heads over {model.max_contexts} contexts"
    _text(ax, MIDDLE, 4.28, attention, color=PAPER, weight="bold")
    for y, name, colour in ((5.12, "Feed-forward", PHASE2), (5.92, "Output head", FROZEN)):
        _arrow(ax, (top, y - 0.58), (top, y - 0.24))
        _box(ax, top, y, 1.6, 0.46, colour)
        _text(ax, top, y, name, color=PAPER, weight="bold")
    _arrow(ax, (top, 6.15), (top, 6.41))
    _text(ax, top, 6.55, "next token, i + 1", weight="bold")


def _draw_notes(ax: Axes, model: ModelConfig) -> None:
    """What each layer computes, and its parameters, right of it."""
    count, hidden = part_sizes(model), f"{model.hidden_size:,}"
    kept = f"one every {model.interval} tokens back from i" if model.interval > 1 else "every one back from i"
    _note(ax, 1.65, "x = LayerNorm(table[token])", f"{count['wte'] + count['embedding_norm']:,} parameters")
    _note(ax, 2.58, "c ← LayerNorm(c + GELU(Linear[c, x]))", f"{count['context_block']:,} parameters")
    _note(ax, 3.31, f"contexts c, {model.context_dim} numbers each", kept)
    _note(ax, 4.28, "h = LayerNorm(x + attention)", f"{count['attention']:,} parameters")
    widths = f"h + LayerNorm({hidden} → {model.intermediate_size:,} → {hidden})"
    _note(ax, 5.12, widths, f"{count['feed_forward']:,} parameters")
    _note(ax, 5.92, "the token table again (tied)", "no parameters of its own")


def _draw_caption(ax: Axes, model: ModelConfig) -> None:
    count = part_sizes(model)
    trained = count["attention"] + count["feed_forward"]
    _text(ax, LEFT, 6.4, "Context-KV attention", size=18, weight="bold", ha="left")
    _text(ax, LEFT, 6.0, f"attention reads {model.max_contexts} contexts", size=12.5, ha="left")
    _text(ax, LEFT, 5.76, f"from the last {model.context_window:,} tokens", size=12.5, ha="left")
    key = (
        (PHASE1, f"trained in Phase 1: {count['context_block']:,}"),
        (PHASE2, f"trained in Phase 2: {trained:,}"),
        (FROZEN, f"frozen: {count['wte'] + count['embedding_norm']:,}"),
    )
    for i, (colour, label) in enumerate(key):
        _box(ax, LEFT + 0.1, 5.38 - 0.28 * i, 0.2, 0.2, colour)
        _text(ax, LEFT + 0.32, 5.38 - 0.28 * i, label, ha="left")


def _page() -> tuple[Figure, Axes]:
    """An empty page whose coordinates are inches."""
    figure = Figure(figsize=PAGE, facecolor=PAPER)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, PAGE[0]), ylim=(0, PAGE[1]), aspect="equal")
    ax.axis("off")
    return figure, ax


def _box(ax: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    corner = (x - width / 2, y - height / 2)
    style = f"round,pad=0,rounding_size={min(0.08, height / 5)}"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=colour, ec="none"))


def _context(ax: Axes, x: float, y: float) -> None:
    for i in range(4):
        _box(ax, x + 0.16 * (i - 1.5), y, 0.14, 0.22, PHASE1)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = QUIET) -> None:
    style = {"arrowstyle": "-|>,head_width=0.22,head_length=0.4", "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops={**style, "color": colour, "lw": 1.6})


def _span(ax: Axes, start: float, end: float, y: float, label: str) -> None:
    style = {"arrowstyle": "|-|,widthA=0.3,widthB=0.3", "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (end, y), (start, y), arrowprops={**style, "color": QUIET})
    _text(ax, (start + end) / 2, y - 0.2, label, color=QUIET)


def _between(start: float, end: float) -> list[float]:
    """Places of the tokens drawn from one slot to the next, with room in the middle for those left out."""
    steps = [0.25, 0.5] if end - start < 2 else [0.25, 0.5, 0.75]
    return [start + step for step in steps] + [end - step for step in steps]


def _note(ax: Axes, y: float, first: str, second: str) -> None:
    _text(ax, NOTES, y + 0.12, first, ha="left")
    _text(ax, NOTES, y - 0.12, second, ha="left", color=QUIET)


def _text(ax: Axes, x: float, y: float, text: str, size: float = 11, **style: Any) -> None:
    ax.text(x, y, text, fontsize=size, va="center", **{"ha": "center", "color": INK, **style})


if __name__ == "__main__":
    pictures = Path(__file__).parents[1] / ".github"
    save(architecture(ModelConfig()), pictures / "architecture.png")
    save(packages(), pictures / "packages.png")
