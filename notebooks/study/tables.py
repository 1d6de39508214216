"""Rewrite the tables of the study from its results: `python notebooks/study/tables.py`.

The tables are between markers in the files in `PAGES`. `figures.py` draws figures from the same results.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from costs import costs
from rows import FIRST_PAIRS, LEFT_OUT, PAIRS, label

from ctxkv_lib.report.difference import Interval, interval

# The measurements with one seed. Cells of n-grams have no key `seed`.
Cell = dict[str, Any]
# Each key is the name of a variant and a number of training conversations.
Cells = dict[tuple[str, int], list[Cell]]

TOP = Path(__file__).resolve().parents[2]
PAGES = ("docs/study.md", "docs/study-appendix.md", "README.md")
# Numbers of training conversations in the results on ten test conversations, and in those on fifty.
TEN = (10, 50, 100, 200, 500, 1_000, 2_000)
FIFTY = TEN[:5]
SIZES = {10: TEN, 50: FIFTY}
# Rows of `both_studies`: 1 for the first study and 2 for the second, and the name in its results.
ROWS_OF_BOTH = (
    (1, "exact"),
    (2, "exact"),
    (1, "tuned"),
    (2, "OACD"),
    (2, "contexts"),
    (1, "tuned, copying"),
    (2, "contexts with copying"),
    (1, "last 32 tokens"),
    (2, "last 32 tokens"),
    (1, "GRU"),
    (2, "GRU"),
)
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
        cells = cells_of(*parts, "fair/ngrams", "alternatives/sweep")
        # Part `proposals` has no unchanged model with 500 conversations, but part `phase1` has it.
        return cells | {("base", 500): cells["exact", 500]}
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


def table_of_levels(title: str, cells: Cells, names: Iterable[str], sizes: Sequence[int]) -> str:
    """Return a table with a row for each variant and a column for each number of conversations."""
    return table(title, sizes, [levels(cells, name, sizes) for name in names])


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


def compared(conversations: int, pairs: Iterable[str], count: int) -> str:
    """Return a table of the differences between the rows of each pair, with up to `count` intervals each."""
    changes = {
        pair: {n: change(conversations, pair, n)[:count] for n in SIZES[conversations]} for pair in pairs
    }
    sizes = [size for size in SIZES[conversations] if any(row[size] for row in changes.values())]
    lines = [
        [" / ".join(map(label, pair.split(" / "))), *(format_change(row[size]) for size in sizes)]
        for pair, row in changes.items()
    ]
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


def first_ngrams() -> str:
    """Return a table of the test perplexity of recipes and n-grams on ten test conversations."""
    original = ("published", "exact", "exact, directional table")
    chosen = (*original, "kneser_ney", "kneser_ney_cache", "kneser_ney_caches")
    others = ("tuned, copying", "tuned", "kneser_ney_table_caches")
    lines = [levels(tested(10), name, TEN) for name in chosen + others]
    _, *bare = levels(cells_of("baselines/sweep"), "no contexts", TEN)
    lines.insert(-1, ["`tuned` without copying and contexts", *bare])
    return table("test perplexity (10 test conversations)", TEN, lines)


def models() -> str:
    """Return a table of the test perplexity of all models that are not variants of `exact` or of Phase 1."""
    read_tokens = ("no contexts", "tokens at the same slots", "last 32 tokens", "all 640 tokens", "GRU")
    cached = ("GRU with four caches", "GRU with a continuous cache", "contexts with copying and four caches")
    ngrams = [f"kneser_ney{table}{cache}" for table in ("", "_table") for cache in ("", "_cache", "_caches")]
    ordinary = dict.fromkeys(name for name, _ in cells_of("alternatives/sweep"))
    ours = ("contexts", "contexts with copying", "gated, end to end")
    names = (*ours, *read_tokens, *cached, *ordinary, *ngrams)
    return table_of_levels("test perplexity (50 test conversations)", tested(50), names, FIFTY)


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
    return table_of_levels("test perplexity (10 test conversations)", cells, names, (10, 50, 200))


def both_studies() -> str:
    """Return a table that compares the two studies on the ten test conversations that both have."""
    first, sizes, lines = cells_of("baselines/sweep") | tested(10), (10, 50, 200), []
    tokens = np.array(TEST["tokens"]["50"][:10])
    for study, name in ROWS_OF_BOTH:
        _, *values = levels(first, name, sizes)
        if study == 2:
            kept = [np.array(losses(50, name, size))[:, :10] @ tokens / tokens.sum() for size in sizes]
            values = [spread(np.exp(means).tolist()) for means in kept]
        lines.append([f"{label(name)}, {'first' if study == 1 else 'second'} study", *values])
    return table("test perplexity (the 10 test conversations of both studies)", sizes, lines)


def alternatives() -> str:
    """Return a table of the test perplexity of our models and of ordinary models."""
    names = ("exact", "contexts", "contexts with copying", "kneser_ney_table_caches", "GRU", "LSTM", "GPT")
    return table_of_levels("test perplexity (50 test conversations)", tested(50), names, (10, 50, 200, 500))


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
    """Return a table of the test perplexity of `exact` and `tuned` with different kinds of Phase 1."""
    cells = cells_of("phase1/sweep", "objectives/sweep")
    names = dict.fromkeys(name for (name, _), (cell, *_) in cells.items() if "seed" in cell)
    title = "test perplexity (50 test conversations, batches of 2 × 64 positions; `exact`: 512 random ones)"
    return table_of_levels(title, cells, names, FIFTY)


def used(runs: Sequence[Cell], tokens: Sequence[int]) -> dict[int, Interval]:
    """Compute by how many % perplexity rises if all slots from each distance on read wrong contexts."""
    losses, intervals = np.array([run["losses"] for run in runs]), {}
    for distance in DISTANCES[:-1]:
        nearest = [max(at for at in map(int, run["rises"]) if at <= distance) for run in runs]
        rises = np.array([run["rises"][str(at)] for run, at in zip(runs, nearest, strict=True)])
        intervals[distance] = interval((losses + rises) / 1000, losses / 1000, np.array(tokens))
    return intervals


def rises(recipe: str, samples: int) -> dict[int, Interval]:
    """Return `used` for the recipe's models in part `evidence`, or {} if there are none."""
    results = read("evidence/evidence")
    runs = [run for run in results["runs"] if (run["recipe"], run["samples"]) == (recipe, samples)]
    return used(runs, results["tokens"]) if runs else {}


def slots() -> str:
    """Return a table of what slots far back are worth in `exact` and in `tuned`."""
    sizes = (50, 100, 200, 500)
    alone = (format_change(change(50, "exact, one slot / exact", size)[:1]) for size in sizes)
    lines = [["`exact`, trained with the current context alone (test)", *alone]]
    for recipe, distance, slots in (
        ("exact", 1, "`exact`, all slots but the current one"),
        ("tuned", 1, "`tuned`, all slots but the current one"),
        ("tuned", 10, "`tuned`, slots 10 or more tokens back"),
    ):
        found = [rises(recipe, size).get(distance) for size in sizes]
        changes = (format_change([each] if each else []) for each in found)
        lines.append([f"{slots}, with contexts from elsewhere (validation)", *changes])
    return table("change of the perplexity in %", sizes, lines)


def proposals() -> str:
    """Return a table of the original's proposals, each alone in `exact`, with 100 and 500 conversations."""
    names = dict.fromkeys(name for name, _ in cells_of("proposals/sweep"))
    return table_of_levels("test perplexity (50 test conversations)", tested(50), names, (100, 500))


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
            alternatives,
            memory,
            slots,
            models,
            phase1,
            proposals,
            first_ngrams,
            first_study,
            both_studies,
            changes,
        )
    },
    **{name: partial(compared, 50, pairs, 1) for name, (pairs, _) in PAIRS.items()},
    **{f"{name}_both": partial(compared, 50, pairs + more, 2) for name, (pairs, more) in PAIRS.items()},
    "first_differences": partial(compared, 10, FIRST_PAIRS, 1),
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
