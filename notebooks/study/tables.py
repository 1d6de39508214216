"""The tables of the study, from its results: `python notebooks/study/tables.py` rewrites them.

They stand between markers in docs/study.md and README.md. `figures.py` draws the same results.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev

from intervals import RESULTS, Interval, Row, difference, known_groups, losses, read_rows

TOP = Path(__file__).resolve().parents[2]
PAGES = ("docs/study.md", "README.md")
TEN = (10, 50, 100, 200, 500, 1_000, 2_000)  # training conversations of rows with ten test conversations
FIFTY = TEN[:5]  # and with fifty
SIZES = {10: TEN, 50: FIFTY}
DISTANCES = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640)  # of part `evidence`

NAMES = {  # of rows, where the results have another
    "tuned": "`tuned` without copying",
    "tuned with copying": "`tuned`, copying added after training",
    "tuned, copying": "`tuned`",
    "exact": "`exact`",
    "exact, untrained": "`exact` without Phase 1",
    "exact, one slot": "`exact`, only the present context",
    "exact, directional table": "`exact`, token table of `tuned`",
    "gated, end to end": "gated contexts",
    "OACD": "`tuned` without copying",
    "untrained": "`tuned` without copying and Phase 1",
    "kneser_ney": "n-grams",
    "kneser_ney_cache": "n-grams and a unigram cache",
    "kneser_ney_caches": "n-grams and four caches",
    "kneser_ney_table_caches": "n-grams and four caches, with the token table's text",
}

LEFT_OUT = (  # of the table of changes: `tuned` again, and what says nothing that another row does not
    "bias nearest, means to 40 tokens",
    "means to 40 tokens, OACD rate 0.0005",
    "means to 40 tokens, untrained",
    "random init, bias from 0, symmetric table, no current-token bias, all weights decay by the step",
)
PAIRS = {  # tables of differences: test conversations, and rows
    "beside_ngrams": (
        10,
        "exact / kneser_ney",
        "tuned / kneser_ney_caches",
        "tuned, copying / tuned",
        "tuned, copying / kneser_ney_caches",
        "tuned, copying / kneser_ney_table_caches",
        "tuned with copying / kneser_ney_table_caches",
    ),
    "beside_models": (
        50,
        "contexts / no contexts",
        "contexts / tokens at the same slots",
        "contexts / last 32 tokens",
        "contexts / all 640 tokens",
        "GRU / contexts",
        "contexts with copying / GRU",
        "GRU with four caches / contexts with copying and four caches",
        "GRU with a continuous cache / contexts with copying",
        "gated, end to end / GRU",
        "gated, end to end with copying / GRU",
        "GRU with a continuous cache / gated, end to end with copying",
        "gated, end to end with copying and four caches / GRU with four caches",
    ),
    "beside_phase1": (
        50,
        "exact, untrained / exact",
        "exact, one slot / exact",
        "untrained / OACD",
        "random init, OACD / random init, untrained",
        "untrained / random init, OACD",
        "predictive / gated, untrained",
        "predictive / OACD",
        "predictive and OACD / predictive",
        "autoencoding / gated, untrained",
    ),
}


def rows_of(*files: str) -> list[Row]:
    """Read the rows of some files of results; the cache that a row was measured with is part of its name."""
    rows = [row for file in files for row in read_rows(RESULTS / f"{file}.json")]
    for row in rows:
        if (kind := row.get("kind", "model")) != "model":
            row["variant"] += f" with {kind.replace('continuous', 'a continuous')}"
    return rows


@cache
def first_study() -> list[Row]:
    """Read the rows of the first study, with ten test conversations.

    Of variants that were trained twice, these are the runs whose losses by conversation are known, if any:
    so tables and intervals are of the same runs.
    """
    again = rows_of("cache/cache")
    known = {(row["variant"], row["samples"]) for row in again}
    swept = rows_of("answer/sweep", "full/sweep")
    return again + [row for row in swept if (row["variant"], row["samples"]) not in known]


@cache
def tested(conversations: int) -> list[Row]:
    """Read the rows with losses of the ten test conversations, or of the fifty."""
    if conversations == 50:
        return rows_of("fair/sweep", "fair/cache", "phase1/sweep")
    return first_study()


def mean_ppl(variant: str, samples: int) -> float | None:
    """Return the mean test perplexity over seeds in the first study; None if it has not run."""
    rows = [row for row in first_study() if (row["variant"], row["samples"]) == (variant, samples)]
    ppls = [row["test_ppl"] for row in rows if "test_ppl" in row]
    return mean(ppls) if ppls else None


def table(title: str, columns: Sequence[str | int], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table; `columns` are those after the first, aligned to the right."""
    names = [column if isinstance(column, str) else f"{column:,}" for column in columns]
    head, *body = (f"| {' | '.join(line)} |" for line in [[title, *names], *rows])
    return "\n".join([head, f"|---{'|---:' * len(columns)}|", *body])


def label(variant: str) -> str:
    base, _, kind = variant.partition(" with ")
    return NAMES.get(variant) or NAMES.get(base, base) + (kind and f" with {kind}")


def spread(values: Sequence[float]) -> str:
    """Write the mean, and the standard deviation over seeds."""
    if not values:
        return "–"
    return f"{mean(values):,.1f}" + (f" ± {stdev(values):,.1f}" if len(values) > 1 else "")


def levels(rows: Sequence[Row], variant: str, sizes: Sequence[int]) -> list[str]:
    """Write the name of a variant, and its test perplexity at each size."""
    known = [row for row in rows if row["variant"] == variant and "test_ppl" in row]
    ppls = ([row["test_ppl"] for row in known if row["samples"] == size] for size in sizes)
    return [label(variant), *map(spread, ppls)]


def percent(value: float) -> str:
    return f"{value:+.{0 if abs(value) >= 10 else 1}f}"


@cache
def change(conversations: int, pair: str, samples: int, grouped: bool = False) -> Interval | None:
    """Compare the two rows of a pair `own / other`; None if either is not there."""
    own, other = (losses(tested(conversations), name, samples) for name in pair.split(" / "))
    return difference(own, other, known_groups(own.tokens) if grouped else None) if own and other else None


def changes_of(conversations: int, pair: str, samples: int) -> list[Interval]:
    """Compare a pair, on fifty conversations also by groups of speakers; empty if either is not there."""
    ways = (False, True) if conversations == 50 else (False,)
    return [shown for way in ways if (shown := change(conversations, pair, samples, way))]


def compared(conversations: int, *pairs: str) -> str:
    """Write changes of pairs, with intervals; on fifty conversations also those by groups of speakers."""
    sizes, lines = SIZES[conversations], []
    for pair in pairs:
        lines.append([" / ".join(map(label, pair.split(" / ")))])
        for size in sizes:
            intervals = changes_of(conversations, pair, size)
            ends = "; ".join(f"{percent(interval.low)} to {percent(interval.high)}" for interval in intervals)
            lines[-1].append(f"{percent(intervals[0].percent)} ({ends})" if intervals else "–")
    return table(f"change of the test perplexity in %, {conversations} test conversations", sizes, lines)


def validation() -> str:
    """Compare with the original at its sizes, 100 and 500 conversations."""
    ppl = {(row["variant"], row["samples"]): row["val_ppl"] for row in rows_of("full/sweep")}
    found = [("the original, UltraChat (NVIDIA L4)", 361.0, 175.7)]  # from its report
    for variant, name in (
        ("published", "`published`, offline (both: 5 hours on a CPU core)"),
        ("exact", "`exact`, offline (3 hours)"),
        ("kneser_ney", "n-grams (counts of short runs of tokens), offline"),
    ):
        found.append((name, ppl[variant, 100], ppl[variant, 500]))
    lines = [[name, f"{few:.1f}", f"{many:.1f}", f"{1 - many / few:.0%}"] for name, few, many in found]
    return table("validation perplexity, by conversations", (100, 500, "lower by"), lines)


def ngrams() -> str:
    """Write the test perplexity of recipes and n-grams, on the ten conversations."""
    rows = first_study()
    chosen = ("exact", "exact, directional table", "kneser_ney", "kneser_ney_cache", "kneser_ney_caches")
    others = ("tuned, copying", "tuned", "kneser_ney_table_caches")
    lines = [levels(rows, name, TEN) for name in chosen + others]
    _, *bare = levels(rows_of("baselines/sweep"), "no contexts", TEN)
    lines.insert(-1, ["`tuned` without copying and contexts", *bare])
    return table("test perplexity (10 test conversations, batches of random positions)", TEN, lines)


def models() -> str:
    """Write the test perplexity of contexts and what could stand in their place, on the fifty."""
    others = ("no contexts", "tokens at the same slots", "last 32 tokens", "all 640 tokens", "GRU")
    lines = []
    for name in ("contexts", *others, "gated, end to end"):
        lines.append(levels(tested(50), name, FIFTY))
        for place, size in enumerate(FIFTY if name in others else (), start=1):
            found = change(50, f"{name} / contexts", size)
            lines[-1][place] += " ≈" if found and found.low <= 0 <= found.high else ""
    return table("test perplexity (50 test conversations, batches of 2 × 64 positions)", FIFTY, lines)


def phase1() -> str:
    rows = rows_of("phase1/sweep")
    names = dict.fromkeys(row["variant"] for row in rows if row["seed"])
    title = "test perplexity (50 test conversations, batches of 2 × 64 positions; `exact`: 512 random ones)"
    return table(title, FIFTY, [levels(rows, name, FIFTY) for name in names])


def changes() -> str:
    """Write the validation perplexity with 50 conversations of variants of `tuned`, the lowest first."""
    found: dict[str, list[Row]] = {}
    for row in rows_of("levers/sweep", "memory/sweep"):
        if row["samples"] == 50 and row["seed"] and row["variant"] not in LEFT_OUT:
            found.setdefault(row["variant"], []).append(row)
    ppls = {name: [row["val_ppl"] for row in rows] for name, rows in found.items()}
    lines = []
    for name in sorted(ppls, key=lambda name: mean(ppls[name])):
        spans = [row["measured"]["horizon"] for row in found[name] if "horizon" in row.get("measured", {})]
        moved = percent(100 * (mean(ppls[name]) / mean(ppls["tuned"]) - 1))
        lines.append([label(name), spread(ppls[name]), moved, f"{mean(spans):.0f}" if spans else "–"])
    return table(
        "change of `tuned` without copying",
        ("validation perplexity, 10 conversations", "in %", "span"),
        lines,
    )


TABLES: dict[str, Callable[[], str]] = {
    **{f.__name__: f for f in (validation, ngrams, models, phase1, changes)},
    **{name: lambda asked=asked: compared(*asked) for name, asked in PAIRS.items()},
}


def written(text: str) -> str:
    """Return a page with its tables made anew: those between `<!-- table: NAME -->` and `<!-- /table -->`."""
    pattern = r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text, flags=re.S)


def main() -> None:
    """Rewrite the tables of all pages."""
    for path in (TOP / page for page in PAGES):
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
