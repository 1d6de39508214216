"""Rewrite the tables of the study from its results: `python notebooks/study/tables.py`.

The tables are between markers in the files in `PAGES`. `figures.py` draws figures from the same results.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from costs import costs
from rows import LEFT_OUT, PAIRS, label

from ctxkv_lib.report.difference import Interval, interval

# The measurements with one seed. Cells of n-grams have no key `seed`.
Cell = dict[str, Any]
# Each key is the name of a variant and a number of training conversations.
Cells = dict[tuple[str, int], list[Cell]]

TOP = Path(__file__).resolve().parents[2]
PAGES = ("docs/study.md", "README.md", "notebooks/study/README.md")
# Numbers of training conversations in the results on ten test conversations, and in those on fifty.
TEN = (10, 50, 100, 200, 500, 1_000, 2_000)
FIFTY = TEN[:5]
SIZES = {10: TEN, 50: FIFTY}
# Distances back, in tokens, that part `evidence` measures.
DISTANCES = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640)


def read(name: str) -> Any:
    """Read a file in the folder `results`, such as `fair/sweep`."""
    path = Path(__file__).with_name("results") / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


# For ten and for fifty test conversations: the number of tokens in each, and its group of speakers.
TEST = read("test_conversations")
# Bootstrap draws consist of groups of conversations: single ones, or all that share speakers.
GROUPS = {10: [range(10)], 50: [range(50), TEST["speakers"]["50"]]}


def cells_in(results: Any) -> Iterator[Cell]:
    """Yield the cells in a file of results. If a variant has a cache, its name says so."""
    for row in results.get("rows", ()):
        yield from ({**row, **cell} for cell in row["cells"])
    for samples, kinds in results.get("ngrams", {}).items():
        yield from ({"variant": name, "samples": int(samples), **cell} for name, cell in kinds.items())
    for run in results.get("runs", ()):
        for kind, cell in run["rows"].items():
            beside = "" if kind == "model" else f" with {kind.replace('continuous', 'a continuous')}"
            yield {**run, **cell, "variant": run["variant"] + beside}


def cells_of(*names: str) -> Cells:
    """Read files of results. For a variant and size in several files, use the last file's cells."""
    cells: Cells = {}
    for name in names:
        latest: Cells = {}
        for cell in cells_in(read(name)):
            latest.setdefault((cell["variant"], cell["samples"]), []).append(cell)
        cells |= latest
    return cells


@cache
def tested(conversations: int) -> Cells:
    """Read the measurements on ten or on fifty test conversations.

    Some variants were trained twice. Only their runs in `cache/cache` are used, because these runs have
    losses per conversation. So tables and intervals use the same runs.
    """
    if conversations == 50:
        parts = ("fair/sweep", "fair/cache", "phase1/sweep", "objectives/sweep", "proposals/sweep")
        return cells_of(*parts, "fair/ngrams", "alternatives/sweep")
    return cells_of("answer/sweep", "full/sweep", "cache/cache")


def ppls_of(cells: Cells, variant: str, samples: int) -> list[float]:
    """List the test perplexities of a variant, one per seed. Return [] if it has no results."""
    return [cell["test_ppl"] for cell in cells.get((variant, samples), ()) if "test_ppl" in cell]


def losses(conversations: int, variant: str, samples: int) -> list[list[float]]:
    """List the mean losses of the test conversations in nats, for each seed for which they were saved."""
    cells = tested(conversations).get((variant, samples), ())
    return [cell["test_conversations"] for cell in cells if "test_conversations" in cell]


def table(title: str, columns: Sequence[str | int], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. `title` names the first column, and `columns` names the others."""
    names = [column if isinstance(column, str) else f"{column:,}" for column in columns]
    head, *body = (f"| {' | '.join(line)} |" for line in [[title, *names], *rows])
    return "\n".join([head, f"|---{'|---:' * len(columns)}|", *body])


def spread(values: Sequence[float]) -> str:
    """Format the mean and the standard deviation of values with different seeds."""
    if not values:
        return "–"
    return f"{mean(values):,.1f}" + (f" ± {stdev(values):,.1f}" if len(values) > 1 else "")


def levels(cells: Cells, variant: str, sizes: Sequence[int]) -> list[str]:
    """Return a table row: a variant's name, and its test perplexity at each number of conversations."""
    return [label(variant), *(spread(ppls_of(cells, variant, size)) for size in sizes)]


def percent(value: float) -> str:
    return f"{value:+.{0 if abs(value) >= 10 else 1}f}"


@cache
def change(conversations: int, pair: str, samples: int) -> list[Interval]:
    """Compare A with B in a pair `A / B`, as `ctxkv.difference` does. Return [] if A or B is missing.

    With fifty test conversations, a second interval treats all conversations of the same speakers as one.
    """
    sides = [losses(conversations, name, samples) for name in pair.split(" / ")]
    if not all(sides):
        return []
    tokens, intervals = np.array(TEST["tokens"][str(conversations)]), []
    for groups in GROUPS[conversations]:
        members = np.eye(max(groups) + 1)[[*groups]]  # (conversations, groups)
        values = ((np.array(side) * tokens) @ members / (tokens @ members) for side in sides)
        intervals.append(interval(*values, tokens @ members))
    return intervals


def format_change(intervals: Sequence[Interval]) -> str:
    """Format a change in % with the ends of its intervals."""
    if not intervals:
        return "–"
    ends = "; ".join(f"{percent(interval.low)} to {percent(interval.high)}" for interval in intervals)
    return f"{percent(intervals[0].percent)} ({ends})"


def compared(conversations: int, *pairs: str) -> str:
    """Return a table of the differences between the rows of each pair, with their intervals."""
    sizes, lines = SIZES[conversations], []
    for pair in pairs:
        name = " / ".join(map(label, pair.split(" / ")))
        lines.append([name, *(format_change(change(conversations, pair, size)) for size in sizes)])
    return table(f"change of the test perplexity in %, {conversations} test conversations", sizes, lines)


def validation() -> str:
    """Return a table that compares our runs with the original's, with 100 and 500 conversations."""
    cells = cells_of("full/sweep")
    lines = [("the original, UltraChat (NVIDIA L4)", 361.0, 175.7)]  # numbers from its report
    for variant, name in (
        ("published", "`published`, offline (both: 5 hours on a CPU core)"),
        ("exact", "`exact`, offline (3 hours)"),
        ("kneser_ney", "n-grams (counts of short token sequences), offline"),
    ):
        few, many = (cells[variant, samples][0]["val_ppl"] for samples in (100, 500))
        lines.append((name, few, many))
    rows = [[name, f"{few:.1f}", f"{many:.1f}", f"{1 - many / few:.0%}"] for name, few, many in lines]
    return table("validation perplexity, by conversations", (100, 500, "lower by"), rows)


def ngrams() -> str:
    """Return a table of the test perplexity of recipes and n-grams on ten test conversations."""
    chosen = ("exact", "exact, directional table", "kneser_ney", "kneser_ney_cache", "kneser_ney_caches")
    others = ("tuned, copying", "tuned", "kneser_ney_table_caches")
    lines = [levels(tested(10), name, TEN) for name in chosen + others]
    _, *bare = levels(cells_of("baselines/sweep"), "no contexts", TEN)
    lines.insert(-1, ["`tuned` without copying and contexts", *bare])
    return table("test perplexity (10 test conversations, batches of random positions)", TEN, lines)


def models() -> str:
    """Return a table of the test perplexity with contexts and alternatives, on fifty test conversations."""
    others = ("no contexts", "tokens at the same slots", "last 32 tokens", "all 640 tokens", "GRU")
    further, lines = ("gated, end to end", "contexts with copying", "kneser_ney_table_caches"), []
    for name in ("contexts", *others, *further):
        lines.append(levels(tested(50), name, FIFTY))
        for place, size in enumerate(FIFTY if name in others else (), start=1):
            intervals = change(50, f"{name} / contexts", size)
            lines[-1][place] += " ≈" if intervals and intervals[0].low <= 0 <= intervals[0].high else ""
    return table("test perplexity (50 test conversations, batches of 2 × 64 positions)", FIFTY, lines)


def first_study() -> str:
    """Return a table of the rows that only the first study has, on ten test conversations."""
    cells = cells_of("baselines/sweep")
    names = (
        "contexts",
        "untrained ContextBlock",
        "ContextBlock trained end to end",
        "32 tokens, 20 apart",
        "no contexts",
    )
    sizes = (10, 50, 200)
    return table(
        "test perplexity (10 test conversations)", sizes, [levels(cells, name, sizes) for name in names]
    )


def alternatives() -> str:
    """Return a table that compares our models with ordinary models, on fifty test conversations."""
    ours = ("exact", "contexts", "contexts with copying", "GRU", "kneser_ney_table_caches")
    theirs = dict.fromkeys(name for name, _ in cells_of("alternatives/sweep"))
    sizes, lines = (10, 50, 200, 500), []
    for name in (*ours, *theirs):
        times = [
            [cell.get("cpu_seconds", 0) / 60 for cell in tested(50).get((name, size), ())] for size in sizes
        ]
        minutes = " / ".join(f"{mean(cells):.0f}" if any(cells) else "–" for cells in times)
        lines.append([*levels(tested(50), name, sizes), minutes if name in theirs else "–"])
    return table("test perplexity (50 test conversations)", (*sizes, "CPU minutes, each run"), lines)


def memory() -> str:
    """Return a table of each model's memory per sequence, multiplications per token, and perplexity."""
    lines, seconds = [], read("epochs/epochs")["seconds"]
    for name, cost in costs().items():
        kept = [format_bytes(cost.kept_bytes(tokens)) for tokens in (640, 100_000)]
        products = f"{cost.multiplications / 1e6:.1f}" if cost.multiplications else "–"
        time = f"{seconds[name] / seconds['exact']:.1f}" if name in seconds else "–"
        ppls = [spread(ppls_of(tested(50), name, size)) for size in (50, 200)]
        lines.append([label(name), *kept, products, time, *ppls])
    columns = ("bytes after 640 tokens", "after 100,000", "million multiplications", "time of an epoch")
    return table("model", (*columns, "test perplexity with 50", "with 200"), lines)


def format_bytes(count: int) -> str:
    """Format a number of bytes in B, kB or MB, with at most three digits."""
    for unit, size in (("MB", 1_000_000), ("kB", 1_000)):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f} {unit}"
    return f"{count} B"


def phase1() -> str:
    cells = cells_of("phase1/sweep", "objectives/sweep")
    names = dict.fromkeys(name for (name, _), (cell, *_) in cells.items() if "seed" in cell)
    title = "test perplexity (50 test conversations, batches of 2 × 64 positions; `exact`: 512 random ones)"
    return table(title, FIFTY, [levels(cells, name, FIFTY) for name in names])


def proposals() -> str:
    """Return a table of the original's proposals, each alone in `exact`, with 100 and 500 conversations."""
    cells, lines = cells_of("proposals/sweep"), []
    for name in dict.fromkeys(name for name, _ in cells):
        changed = [] if name == "base" else change(50, f"{name} / base", 100)
        lines.append(
            [*levels(cells, name, (100,)), *map(format_change, (changed, change(50, f"{name} / exact", 500)))]
        )
    columns = ("test perplexity, 100 conversations", "change in %, 100", "change in %, 500")
    return table("`exact`, 50 test conversations", columns, lines)


def changes() -> str:
    """Return a table of variants of `tuned` with 50 conversations, lowest validation perplexity first."""
    variants = {
        name: cells
        for (name, samples), cells in cells_of("levers/sweep", "memory/sweep").items()
        if samples == 50 and "seed" in cells[0] and name not in LEFT_OUT
    }
    ppls = {name: [cell["val_ppl"] for cell in cells] for name, cells in variants.items()}
    lines = []
    for name in sorted(ppls, key=lambda name: mean(ppls[name])):
        measured = [cell.get("measured", {}) for cell in variants[name]]
        spans = [values["horizon"] for values in measured if "horizon" in values]
        moved = percent(100 * (mean(ppls[name]) / mean(ppls["tuned"]) - 1))
        lines.append([label(name), spread(ppls[name]), moved, f"{mean(spans):.0f}" if spans else "–"])
    return table(
        "change of `tuned` without copying",
        ("validation perplexity, 10 conversations", "in %", "span"),
        lines,
    )


TABLES: dict[str, Callable[[], str]] = {
    **{
        f.__name__: f
        for f in (
            validation,
            ngrams,
            models,
            first_study,
            alternatives,
            memory,
            phase1,
            proposals,
            changes,
        )
    },
    **{name: lambda asked=asked: compared(*asked) for name, asked in PAIRS.items()},
}


def written(text: str) -> str:
    """Return a page's text with a new table after each marker `<!-- table: NAME -->`."""
    pattern = r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text, flags=re.S)


def main() -> None:
    """Rewrite the tables on all pages."""
    for path in (TOP / page for page in PAGES):
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
