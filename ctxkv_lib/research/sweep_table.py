"""The results of a sweep: a row for all seeds of a variant and a sample count, n-grams beside, power laws."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..report.tables import MISSING, distinct, literal, markdown_table, ppl, short, terminal_table, whole

Facts = dict[str, Any]
MOST_PERCENT = 1000  # beyond which a change is not worth its digits
LEAST_SIZES = 3  # sample counts that a power law is fitted to; any two lie on one
SPLITS = ("val_ppl", "test_ppl")
YARDSTICKS = {
    "kneser_ney": "n-grams",
    "kneser_ney_cache": "n-grams and cache",
    "kneser_ney_table_cache": "n-grams (table's text too) and cache",
}
HEADER = ["Variant", "Samples", "Seeds", "Trained", "Val PPL", "Test PPL", "Best epoch", "Seconds"]
NOTE = (
    "PPL: mean over seeds ± standard deviation, at the epoch with the lowest validation PPL. Trained: "
    "weights that Phase 2 trains. Seconds: training of a cell, both phases, mean. n-grams: interpolated "
    "modified Kneser-Ney, counted on the same training tokens, or on the text of a table made from text, too."
)


def _change(percent: float) -> str:
    return f"{percent:+.1f}%" if percent < MOST_PERCENT else f"over {MOST_PERCENT}%"


# What a run is measured by besides PPL: where it stands in the summary, what a table calls it, and how it
# is written there.
MEASURED: dict[str, tuple[tuple[str, ...], str, Callable[[float], str]]] = {
    "horizon": (("probe", "horizon"), "Horizon", "{:.0f}".format),
    "coverage": (("probe", "coverage"), "Coverage", "{:.0%}".format),
    "mean_recall": (("probe", "mean_recall"), "Mean of 20", "{:.2f}".format),
    "effective_rank": (("probe", "effective_rank"), "Rank", "{:.0%}".format),
    "zero": (("ablations", "changed", "zero", "percent"), "Zero", _change),
    "elsewhere": (("ablations", "changed", "elsewhere", "percent"), "Others'", _change),
    "repeated_ppl": (("test", "repeated_ppl"), "Pairs again", ppl),
    "longest_run": (("generation", "longest_run"), "Longest run", "{:.0f}".format),
    "recalled": (("recall_task", "accuracy"), "Recalled", "{:.0%}".format),
}
MEASURED_NOTE = (
    "Means over seeds. Horizon: tokens back that contexts hold anything of. Coverage: share of the window's "
    "tokens that some slot holds. Mean of 20: R² of the mean embedding of the last 20 tokens. Rank: the "
    "effective one over dimensions. Zero, others': what zeros, or another conversation's contexts, add to "
    "validation PPL. Pairs again: test PPL of tokens that form, with the one before, a pair that the window "
    "holds already. Longest run: of one token, in 20 greedy samples of 50. Recalled: of preset recall, right "
    "answers."
)
LAW_NOTE = (
    "PPL = factor * tokens^-exponent, least squares of the logarithms over all runs of a variant. Off by: "
    "the largest distance of a size's mean from that line."
)


def summarize(variants: Facts, cells: Sequence[Facts]) -> Facts:
    """`sweep.json`: variants, cells, a row for each variant and sample count that has results, power laws.

    Args:
        variants: recipe and settings of each, by name.
        cells: each finished one with the yardsticks of its run, of which a sample count keeps the first.
    """
    finished = [cell for cell in cells if cell["state"] == "finished"]
    rows, yardsticks = [], {}
    for samples in sorted({cell["samples"] for cell in finished}):
        group = [cell for cell in finished if cell["samples"] == samples]
        for variant in distinct(cell["variant"] for cell in group):
            rows.append(_row([cell for cell in group if cell["variant"] == variant]))
        yardsticks[str(samples)] = found = _yardsticks(group)
        rows += _yardstick_rows(found, group[0])
    laws = [_power_laws([row for row in rows if row["variant"] == v]) for v in distinct(map(_name, rows))]
    return {
        "variants": variants,
        "cells": [{key: cell[key] for key in cell if key != "yardsticks"} for cell in cells],
        "yardsticks": yardsticks,
        "rows": rows,
        "power_laws": [law for law in laws if law],
    }


def measured(summary: Facts) -> dict[str, float]:
    """Of `MEASURED`, what a run's summary has."""
    found = {}
    for name, (path, *_) in MEASURED.items():
        value: Any = summary
        for key in path:
            value = value.get(key, {})
        if isinstance(value, int | float):
            found[name] = value
    return found


def _name(row: Mapping[str, Any]) -> str:
    return str(row["variant"])


def _row(cells: Sequence[Facts]) -> Facts:
    """All seeds of one variant and sample count."""
    first = cells[0]
    return {
        **{name: first[name] for name in ("variant", "samples", "train_tokens", "trained")},
        "seeds": [cell["seed"] for cell in cells],
        **{split: [cell[split] for cell in cells if split in cell] for split in SPLITS},
        "best_epochs": [cell["best_epoch"] for cell in cells],
        "seconds": statistics.mean(cell["seconds"] for cell in cells),
        "measured": {
            name: statistics.mean(values)
            for name in MEASURED
            if (values := [cell["measured"][name] for cell in cells if name in cell["measured"]])
        },
    }


def _yardsticks(cells: Sequence[Facts]) -> Facts:
    """What counting reaches on the tokens of one sample count, as the first variant that knows it does.

    A variant with a window of its own has a cache of its own; all are held against one.
    """
    found: Facts = {}
    for cell in cells:
        found = {**cell["yardsticks"], **found}
    return {kind: found[kind] for kind in YARDSTICKS if kind in found}


def _yardstick_rows(yardsticks: Facts, cell: Facts) -> list[Facts]:
    """A row for each; no seed has a part in it."""
    common = {"samples": cell["samples"], "train_tokens": cell["train_tokens"], "seeds": []}
    return [
        {"variant": YARDSTICKS[kind], **common, **{s: [found[s]] if s in found else [] for s in SPLITS}}
        for kind, found in yardsticks.items()
    ]


def _power_laws(rows: Sequence[Facts]) -> Facts | None:
    """Of one variant's rows: PPL = factor * tokens^-exponent for each split, if there are enough sizes."""
    laws = {split: law for split in SPLITS if (law := power_law(_points(rows, split)))}
    return {"variant": rows[0]["variant"], **laws} if laws else None


def _points(rows: Sequence[Facts], split: str) -> list[tuple[int, float]]:
    return [(row["train_tokens"], value) for row in rows for value in row[split]]


def power_law(points: Sequence[tuple[int, float]]) -> dict[str, float] | None:
    """Least squares of log PPL on log tokens.

    Args:
        points: training tokens and PPL of each run.

    Returns:
        `factor` and `exponent` of PPL = factor * tokens^-exponent, and `error`, the largest relative distance
        of a size's geometric mean from that; None with fewer than `LEAST_SIZES` sizes.
    """
    sizes = {tokens for tokens, _ in points}
    if len(sizes) < LEAST_SIZES:
        return None
    tokens, ppls = np.log(np.array(points, dtype=np.float64)).T
    slope, intercept = np.polyfit(tokens, ppls, 1)
    means = {size: ppls[tokens == np.log(size)].mean() for size in sizes}
    off = max(abs(float(np.expm1(mean - slope * np.log(s) - intercept))) for s, mean in means.items())
    return {"factor": float(np.exp(intercept)), "exponent": float(-slope), "error": off}


def format_sweep(results: Facts) -> str:
    """The table for a terminal, and why cells did not finish."""
    failures = [f"{_cell_name(cell)}: {cell['state']}. {cell['error']}" for cell in _failures(results)]
    table = terminal_table([HEADER, *map(_cells, results["rows"])])
    return "\n".join([table, *(["", *failures] if failures else [])])


def _cells(row: Facts) -> list[str]:
    epochs = ", ".join(map(str, row.get("best_epochs", []))) or MISSING
    return [
        row["variant"],
        whole(row["samples"]),
        str(len(row["seeds"]) or MISSING),
        whole(row.get("trained")),
        *(_mean(row[split]) for split in SPLITS),
        epochs,
        short(row.get("seconds")),
    ]


def _mean(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return MISSING
    spread = f" ± {ppl(statistics.stdev(values))}" if len(values) > 1 else ""
    return ppl(statistics.mean(values)) + spread


def sweep_document(results: Facts) -> str:
    """`sweep.md`."""
    cells = results["cells"]
    states = [cell["state"] for cell in cells]
    told = ", ".join(f"{states.count(state)} {state}" for state in distinct(states))
    table = markdown_table(HEADER, [[literal(name), *row] for name, *row in map(_cells, results["rows"])])
    blocks = ["# Sweep", f"{len(cells)} cells: {told}.", table, NOTE]
    if commits := distinct(cell["git_commit"] or "unknown" for cell in cells if "git_commit" in cell):
        blocks.append(f"Made by commit {', '.join(commits)}.")
    if any(row.get("measured") for row in results["rows"]):
        blocks += ["## What contexts hold, and what they are used for", _measured_table(results["rows"])]
        blocks.append(MEASURED_NOTE)
    if laws := results["power_laws"]:
        blocks += ["## PPL against training tokens", _law_table(laws), LAW_NOTE]
    if failures := _failures(results):
        lines = [f"- {literal(_cell_name(c))}: {c['state']}. {literal(c['error'])}" for c in failures]
        blocks += ["## Not finished", "\n".join(lines)]
    blocks += ["## Variants", "\n".join(_variant(*each) for each in results["variants"].items())]
    return "\n\n".join(blocks) + "\n"


def _measured_table(rows: Sequence[Facts]) -> str:
    """A column for each measure that any variant has."""
    known = [name for name in MEASURED if any(name in row.get("measured", {}) for row in rows)]
    header = ["Variant", "Samples", *(MEASURED[name][1] for name in known)]
    body = []
    for row in rows:
        if found := row.get("measured"):
            cells = [MEASURED[name][2](found[name]) if name in found else MISSING for name in known]
            body.append([literal(row["variant"]), whole(row["samples"]), *cells])
    return markdown_table(header, body)


def _variant(name: str, variant: Facts) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in variant["settings"].items())
    words = f"recipe {variant['recipe']}" + (f", {settings}" if settings else "")
    return f"- {literal(name)}: {literal(words)}"


def _law_table(laws: Sequence[Facts]) -> str:
    rows = []
    for law in laws:
        found = [law.get(split) for split in SPLITS]
        exponents = [f"{each['exponent']:.3f}" if each else MISSING for each in found]
        off = [f"{each['error']:.1%}" if each else MISSING for each in found]
        rows.append([literal(law["variant"]), exponents[0], off[0], exponents[1], off[1]])
    return markdown_table(["Variant", "Exponent, val", "off by", "Exponent, test", "off by"], rows)


def _failures(results: Facts) -> list[Facts]:
    return [cell for cell in results["cells"] if "error" in cell]


def _cell_name(cell: Facts) -> str:
    return f"{cell['variant']}, {cell['samples']:,} samples, seed {cell['seed']}"
