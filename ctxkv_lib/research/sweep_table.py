"""The results of a sweep: a row for all seeds of a variant and sample count, n-gram baselines, power laws."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..report.tables import MISSING, at, distinct, literal, markdown_table, ppl, short, terminal_table, whole

Facts = dict[str, Any]
MOST_PERCENT = 1000  # beyond which a change is not worth its digits
LEAST_SIZES = 3  # sample counts that a power law is fitted to; any two lie on one
SPLITS = ("val_ppl", "test_ppl")
NGRAMS = {
    "kneser_ney": "n-grams",
    "kneser_ney_cache": "n-grams and cache",
    "kneser_ney_table_cache": "n-grams (table's text too) and cache",
}
HEADER = ["Variant", "Samples", "Seeds", "Trained", "Val PPL", "Test PPL", "Best epoch", "Seconds"]


def _change(percent: float) -> str:
    return f"{percent:+.1f}%" if percent < MOST_PERCENT else f"over {MOST_PERCENT:,}%"


# What a run is measured by besides PPL: its path in the summary, its column's name and its format.
MEASURED: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "horizon": ("probe.horizon", "Memory span", "{:.0f}".format),
    "coverage": ("probe.coverage", "Coverage", "{:.0%}".format),
    "mean_recall": ("probe.mean_recall", "Mean of 20", "{:.2f}".format),
    "effective_rank": ("probe.effective_rank", "Rank", "{:.0%}".format),
    "zero": ("ablations.changed.zero.percent", "Zero", _change),
    "elsewhere": ("ablations.changed.elsewhere.percent", "Others'", _change),
    "repeated_ppl": ("test.repeated_ppl", "Pairs again", ppl),
    "longest_run": ("generation.longest_run", "Longest run", "{:.0f}".format),
    "recalled": ("recall_task.accuracy", "Recalled", "{:.0%}".format),
}


def cell_results(summary: Facts) -> Facts:
    """What a cell of `sweep.json` has of its run's summary, with the n-grams of its sample count."""
    phase2, test, provenance = summary["phase2"], summary.get("test", {}), summary["provenance"]
    ngrams, commit = summary.get("ngrams", {}), provenance["git_commit"]
    return {
        "train_tokens": summary["train_tokens"],
        "trained": summary["parameters"]["trainable_phase2"],
        **{name: phase2[name] for name in ("best_epoch", "val_ppl", "val_acc", "train_ppl")},
        **{f"test_{name}": test[name] for name in ("ppl", "acc") if name in test},
        "measured": measured(summary),
        "seconds": summary["phase1"]["seconds"] + sum(epoch["seconds"] for epoch in phase2["epochs"]),
        "ngrams": {kind: {k: row[k] for k in SPLITS if k in row} for kind, row in ngrams.items()},
        **{name: provenance[name] for name in ("precision", "threads") if name in provenance},
        "git_commit": commit and commit[:12] + commit[40:],  # and whether it was changed
    }


def measured(summary: Facts) -> dict[str, float]:
    """Collect what a run's summary has of `MEASURED`."""
    found = {name: at(summary, *path.split(".")) for name, (path, *_) in MEASURED.items()}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def summarize(variants: Facts, cells: Sequence[Facts]) -> Facts:
    """Make `sweep.json`: cells, a row for each variant and sample count that has results, power laws.

    Args:
        variants: recipe and settings of each, by name.
        cells: each finished one with the `ngrams` of its run, of which a sample count keeps the first: a
            variant with a window of its own has a cache of its own, and all are compared with one.
    """
    finished = [cell for cell in cells if cell["state"] == "finished"]
    rows, ngrams = [], {}
    for samples in sorted({cell["samples"] for cell in finished}):
        group = [cell for cell in finished if cell["samples"] == samples]
        for variant in distinct(cell["variant"] for cell in group):
            rows.append(_row([cell for cell in group if cell["variant"] == variant]))
        found = {kind: row for cell in reversed(group) for kind, row in cell["ngrams"].items()}
        ngrams[str(samples)] = {kind: found[kind] for kind in NGRAMS if kind in found}
        rows += [_ngram_row(kind, row, group[0]) for kind, row in ngrams[str(samples)].items()]
    names = distinct(row["variant"] for row in rows)
    laws = [_power_laws([row for row in rows if row["variant"] == name]) for name in names]
    return {
        "variants": variants,
        "cells": [{key: cell[key] for key in cell if key != "ngrams"} for cell in cells],
        "ngrams": ngrams,
        "rows": rounded(rows),
        "power_laws": rounded([law for law in laws if law]),
    }


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


def _ngram_row(kind: str, found: Facts, cell: Facts) -> Facts:
    ppls = {split: [found[split]] if split in found else [] for split in SPLITS}
    common = {name: cell[name] for name in ("samples", "train_tokens")}
    return {"variant": NGRAMS[kind], **common, "seeds": [], **ppls}


def _power_laws(rows: Sequence[Facts]) -> Facts | None:
    """PPL = factor * tokens^-exponent for each split of one variant's rows, if there are enough sizes."""
    laws = {}
    for split in SPLITS:
        if law := power_law([(row["train_tokens"], value) for row in rows for value in row[split]]):
            laws[split] = law
    return {"variant": rows[0]["variant"], **laws} if laws else None


def power_law(points: Sequence[tuple[int, float]]) -> dict[str, float] | None:
    """Fit log PPL on log tokens by least squares.

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


def rounded(value: Any) -> Any:
    """Round all numbers to six digits, since studies are passed on."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def format_sweep(results: Facts) -> str:
    """Format the table for a terminal, and why cells did not finish."""
    failures = [f"{name}: {state}. {error}" for name, state, error in _failures(results)]
    table = terminal_table([HEADER, *map(_cells, results["rows"])])
    return "\n".join([table, *(["", *failures] if failures else [])])


def _cells(row: Facts) -> list[str]:
    return [
        row["variant"],
        whole(row["samples"]),
        str(len(row["seeds"]) or MISSING),
        whole(row.get("trained")),
        *(_mean(row[split]) for split in SPLITS),
        ", ".join(map(str, row.get("best_epochs", []))) or MISSING,
        short(row.get("seconds")),
    ]


def _mean(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return MISSING
    spread = f" ± {ppl(statistics.stdev(values))}" if len(values) > 1 else ""
    return ppl(statistics.mean(values)) + spread


def sweep_document(results: Facts) -> str:
    """Write `sweep.md`, by the template `sweep.md.j2`."""
    cells, rows = results["cells"], results["rows"]
    states = [cell["state"] for cell in cells]
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template.filters["literal"] = literal
    return template.get_template("sweep.md.j2").render(
        results,
        counts=", ".join(f"{states.count(state)} {state}" for state in distinct(states)),
        table=markdown_table(HEADER, [[literal(name), *row] for name, *row in map(_cells, rows)]),
        commits=distinct(cell["git_commit"] or "unknown" for cell in cells if "git_commit" in cell),
        measured=_measured_table(rows) if any(row.get("measured") for row in rows) else "",
        failures=_failures(results),
    )


def _measured_table(rows: Sequence[Facts]) -> str:
    """A column for each measurement that any variant has."""
    known = [name for name in MEASURED if any(name in row.get("measured", {}) for row in rows)]
    header = ["Variant", "Samples", *(MEASURED[name][1] for name in known)]
    body = []
    for row in rows:
        if found := row.get("measured"):
            cells = [MEASURED[name][2](found[name]) if name in found else MISSING for name in known]
            body.append([literal(row["variant"]), whole(row["samples"]), *cells])
    return markdown_table(header, body)


def _failures(results: Facts) -> list[tuple[str, str, str]]:
    """Name, state and reason of each cell that did not finish."""
    return [
        (f"{cell['variant']}, {cell['samples']:,} samples, seed {cell['seed']}", cell["state"], cell["error"])
        for cell in results["cells"]
        if "error" in cell
    ]
