"""The pictures of the architecture and of the package's rooms.

Coordinates are inches on the page, so that lengths and font sizes (points) stay in proportion.
"""

from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from ..method.config import ModelConfig
from ..method.windows import slot_offsets
from .axes import INK, OKABE_ITO, PAPER, QUIET, RULE

FROZEN, PHASE1, PHASE2, PASSED = QUIET, "#00835f", OKABE_ITO[0], "#b9bec7"
PAGE = (10.2, 6.75)
LEFT, RIGHT, NOTES = 0.35, 6.75, 6.95
COLUMNS = (0.85, 3.15, 4.65, 6.15)  # x of the oldest slot, then of the three newest
MIDDLE = (LEFT + RIGHT) / 2

# Rooms from the top floor down, with their one job and, where the data does not pass, what to find there.
ROOMS = {
    "front door": ("names on first use", "import ctxkv_lib as ctxkv: what notebooks and scripts call"),
    "cli/": ("parses, calls, prints", "ctxkv run, compare, report, generate, evaluate, ..."),
    "bench/": ("speed and memory", "beside the original's loops and the hardware's floor"),
    "experiments/": ("whole runs", "the stages in order; what is done is not done again"),
    "report/": ("the written report", "in both languages; model card"),
    "views/": ("figures and widgets", "and what notebooks share"),
    "measures/": ("what a run is worth", "test split, n-grams, what contexts remember"),
    "runs/": ("what is on disk", "where it came from; trained runs in use"),
    "baselines/": ("instead of contexts", "a GRU, tokens, nothing"),
    "training/": ("both phases", "losses, evaluation"),
    "data/": ("text, tokens, table", ""),
    "config/": ("every setting", "presets and recipes"),
    "ground": ("for everyone", "locks, files, progress, memory, ranks, errors, threads"),
}
STANDS_ALONE = 3  # floors from the bottom that have `model/` beside them
FLOOR_STEP, FLOOR_HEIGHT = 0.445, 0.39
PATH = (4.05, 5.7, 7.35, 9.0)  # x of the stations of the data
WALL = 6.65  # left of `model/`


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


def rooms() -> Figure:
    """The package as a house: its rooms, which import only downwards, and the data's way up through them."""
    figure, ax = _page()
    _text(
        ax, LEFT, 6.45, "The rooms of ctxkv_lib, and the path of the data", size=18, weight="bold", ha="left"
    )
    _text(ax, LEFT, 6.1, "A room imports only from rooms below it.", size=12.5, ha="left")
    for number, (name, (job, content)) in enumerate(reversed(ROOMS.items())):
        right = WALL - 0.08 if number < STANDS_ALONE else PAGE[0] - LEFT
        _floor(ax, _storey(number), right, name, job)
        size = 10 if number else 8.7  # the ground has many small rooms beside `model/`
        _text(ax, PATH[0] - 0.65, _storey(number), content, ha="left", size=size, color=QUIET)
    _draw_model_room(ax)
    _draw_path(ax)
    return figure


def _storey(number: int) -> float:
    """Height of the middle of a floor, counted from the bottom."""
    return 0.35 + FLOOR_STEP * number


def _floor(ax: Axes, y: float, right: float, name: str, job: str) -> None:
    _box(ax, (LEFT + right) / 2, y, right - LEFT, FLOOR_HEIGHT, RULE)
    _text(ax, LEFT + 0.15, y, name, ha="left", weight="bold")
    _text(ax, LEFT + 1.45, y, job, ha="left", size=10)


def _draw_model_room(ax: Axes) -> None:
    """`model/`, beside the lowest floors, because it imports nothing."""
    right, height = PAGE[0] - LEFT, FLOOR_STEP * (STANDS_ALONE - 1) + FLOOR_HEIGHT
    middle = (WALL + right) / 2
    _box(ax, middle, _storey(1), right - WALL, height, RULE)
    _text(ax, WALL + 0.15, _storey(2), "model/", ha="left", weight="bold")
    _text(ax, WALL + 0.95, _storey(2), "the Hugging Face model", ha="left", size=10)
    _station(ax, WALL + 0.5, _storey(1), "table", FROZEN, width=0.7)
    _station(ax, WALL + 1.53, _storey(1), "ContextBlock", PHASE1, width=1.2)
    _station(ax, WALL + 2.64, _storey(1), "attention", PHASE2, width=0.84)
    _text(ax, middle, _storey(0), "stands alone: saved beside the weights", size=10, color=QUIET)


def _draw_path(ax: Axes) -> None:
    """From conversations to the report: along a floor, then up to the next room."""
    data, training, runs, views, report = (_storey(number) for number in (2, 3, 5, 7, 8))
    a, b, c, d = PATH
    way = (
        (a, data, "conversations", INK),
        (b, data, "tokens", INK),
        (b, training, "Phase 1", PHASE1),
        (c, training, "contexts", PHASE1),
        (d, training, "Phase 2", PHASE2),
        (d, runs, "run folder", INK),
        (d, views, "figures", INK),
        (d, report, "report", INK),
    )
    for x, y, name, colour in way:
        _station(ax, x, y, name, colour)
    for (x0, y0, *_), (x1, y1, *_) in pairwise(way):
        if y0 == y1:
            _arrow(ax, (x0 + 0.65, y0), (x1 - 0.65, y1), INK)
        else:
            _arrow(ax, (x0, y0 + 0.16), (x1, y1 - 0.16), INK)


def _station(ax: Axes, x: float, y: float, name: str, colour: str, width: float = 1.3) -> None:
    _box(ax, x, y, width, 0.32, colour)
    _text(ax, x, y, name, size=10, color=PAPER, weight="bold")


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters of each part of the Context-KV model; they add up to its total."""
    hidden, inner = model.hidden_size, model.intermediate_size
    return {
        "table": model.vocab_size * hidden,
        "norm": 2 * hidden,
        "context_block": model.block_size(),
        "attention": model.attention_size(model.context_dim),
        "feed_forward": _linear(hidden, inner) + _linear(inner, hidden) + 2 * hidden,
    }


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _columns(model: ModelConfig) -> list[tuple[float, int]]:
    """(x, tokens back) of the slots drawn: the oldest and up to three newest, left to right."""
    slots = sorted({0, 1, 2, model.max_contexts - 1} & set(range(model.max_contexts)), reverse=True)
    offsets = slot_offsets(model)
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
    if len(columns) > 1 and model.slots == "uniform":
        _span(ax, COLUMNS[-2], COLUMNS[-1], 0.38, f"{model.interval} tokens")
    _box(ax, MIDDLE, 1.65, RIGHT - LEFT, 0.46, FROZEN)
    table = f"Token table  {model.vocab_size:,} × {model.hidden_size:,}   →   LayerNorm"
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
    count, hidden = parameter_counts(model), f"{model.hidden_size:,}"
    kept = f"one every {model.interval} tokens back from i" if model.interval > 1 else "every one back from i"
    if model.slots == "geometric":
        kept = "close together near i, ever further apart"
    _note(ax, 1.65, "x = LayerNorm(table[token])", f"{count['table'] + count['norm']:,} parameters")
    _note(ax, 2.58, "c ← LayerNorm(c + GELU(Linear[c, x]))", f"{count['context_block']:,} parameters")
    _note(ax, 3.31, f"contexts c, {model.context_dim} numbers each", kept)
    _note(ax, 4.28, "h = LayerNorm(x + attention)", f"{count['attention']:,} parameters")
    widths = f"h + LayerNorm({hidden} → {model.intermediate_size:,} → {hidden})"
    _note(ax, 5.12, widths, f"{count['feed_forward']:,} parameters")
    _note(ax, 5.92, "the token table again (tied)", "no parameters of its own")


def _draw_caption(ax: Axes, model: ModelConfig) -> None:
    count = parameter_counts(model)
    trained = count["attention"] + count["feed_forward"]
    _text(ax, LEFT, 6.4, "Context-KV attention", size=18, weight="bold", ha="left")
    _text(ax, LEFT, 6.0, f"{model.context_window:,} tokens of history in", size=12.5, ha="left")
    _text(ax, LEFT, 5.76, f"{model.max_contexts} key-value slots", size=12.5, ha="left")
    key = (
        (PHASE1, f"trained in Phase 1: {count['context_block']:,}"),
        (PHASE2, f"trained in Phase 2: {trained:,}"),
        (FROZEN, f"frozen: {count['table'] + count['norm']:,}"),
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
