"""Results of a sweep: one row per variant and sample count, n-gram baselines."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..progress import counted
from ..report.document import environment
from ..report.tables import MISSING, at, literal, markdown_table, ppl, short, whole
from ..report.terminal import terminal_table
from ..views.power_laws import SPLITS, power_laws
from ..views.study import BASELINES

Entry = dict[str, Any]  # the results of a grid point
Results = dict[str, Any]  # of a sweep
# How many digits of numbers are kept, since studies are passed on.
DIGITS = {**dict.fromkeys(SPLITS, ".6g"), "train_ppl": ".5g", "test_conversations": ".4f"}
FEWER_DIGITS = ".4g"  # of all others
OF_ROW = ("train_tokens", "trained")  # what all entries of a row share
NGRAMS = {kind: name for kind, (name, _) in BASELINES.items()}
HEADER = ["Variant", "Samples", "Seeds", "Trained", "Val PPL", "Test PPL", "Best epoch", "Seconds"]
MEASURED = {  # besides PPL, by the name that results have, from where in a summary
    "horizon": "probe.horizon",
    "coverage": "probe.coverage",
    "mean_recall": "probe.mean_recall",
    "effective_rank": "probe.effective_rank",
    "zero": "ablations.changed.zero.percent",
    "elsewhere": "ablations.changed.elsewhere.percent",
    "repeated_ppl": "repeated_pairs.ppl",
    "longest_run": "generation.longest_run",
    "recalled": "recall_task.accuracy",
}


def results_of(summary: dict[str, Any]) -> Entry:
    """Select the summary fields of an entry, with the n-grams of its sample count."""
    phase2, test, provenance = summary["phase2"], summary.get("test", {}), summary["provenance"]
    ngrams, commit = summary.get("ngrams", {}), provenance["git_commit"]
    measured = {name: at(summary, *path.split(".")) for name, path in MEASURED.items()}
    if "conversations" in test:
        test = {**test, "conversations": [loss for _, loss in test["conversations"]]}
    return rounded(
        {
            "train_tokens": summary["train_tokens"],
            "trained": summary["parameters"]["trainable_phase2"],
            **{name: phase2[name] for name in ("best_epoch", "val_ppl", "val_acc", "train_ppl")},
            **{f"test_{name}": test[name] for name in ("ppl", "acc", "conversations") if name in test},
            "measured": {name: value for name, value in measured.items() if value is not None},
            "seconds": summary["phase1"]["seconds"] + sum(epoch["seconds"] for epoch in phase2["epochs"]),
            "ngrams": {
                kind: {name: row[name] for name in DIGITS if name in row} for kind, row in ngrams.items()
            },
            **{name: provenance[name] for name in ("precision", "threads") if name in provenance},
            "git_commit": commit and commit[:8] + commit[40:],  # and whether it was changed
        }
    )


def summarize(variants: dict[str, Any], entries: Sequence[Entry]) -> Results:
    """Make the results of a sweep: entries, and a row for each variant and sample count that has any.

    Args:
        variants: recipe and settings of each, by name.
        entries: each finished one with the `ngrams` of its run. The first of a sample count are kept, since
            the cache depends on a variant's window and all variants share one baseline.
    """
    finished = [entry for entry in entries if entry["state"] == "finished"]
    rows, ngrams = [], {}
    for samples in sorted({entry["samples"] for entry in finished}):
        group = [entry for entry in finished if entry["samples"] == samples]
        for variant in dict.fromkeys(entry["variant"] for entry in group):
            rows.append(_row([entry for entry in group if entry["variant"] == variant]))
        found = {kind: row for entry in reversed(group) for kind, row in entry["ngrams"].items()}
        ngrams[str(samples)] = {kind: found[kind] for kind in NGRAMS if kind in found}
        common = {name: group[0][name] for name in ("samples", "train_tokens")}
        for kind, row in ngrams[str(samples)].items():
            ppls = {split: [row[split]] if split in row else [] for split in SPLITS}
            rows.append({"variant": NGRAMS[kind], **common, "seeds": [], **ppls})
    return {
        "variants": variants,
        "cells": [{k: entry[k] for k in entry if k not in ("ngrams", *OF_ROW)} for entry in entries],
        "ngrams": ngrams,
        "rows": rounded(rows),
    }


def _row(entries: Sequence[Entry]) -> dict[str, Any]:
    """Summarise all seeds of one variant and sample count."""
    measured = {name: [e["measured"][name] for e in entries if name in e["measured"]] for name in MEASURED}
    return {
        **{name: entries[0][name] for name in ("variant", "samples", *OF_ROW)},
        "seeds": [entry["seed"] for entry in entries],
        **{split: [entry[split] for entry in entries if split in entry] for split in SPLITS},
        "best_epochs": [entry["best_epoch"] for entry in entries],
        "seconds": statistics.mean(entry["seconds"] for entry in entries),
        "measured": {name: statistics.mean(values) for name, values in measured.items() if values},
    }


def rounded(value: Any, digits: str = FEWER_DIGITS) -> Any:
    """Round all numbers, those of each member of an object to its own digits."""
    if isinstance(value, dict):
        return {name: rounded(each, DIGITS.get(name, digits)) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each, digits) for each in value]
    return float(format(value, digits)) if isinstance(value, float) else value


def format_sweep(results: Results) -> str:
    """Format the table for a terminal, and the reasons of unfinished runs."""
    table, failures = terminal_table([HEADER, *map(_cells, results["rows"])]), _failures(results)
    return "\n".join([table, *(["", *failures] if failures else [])])


def sweep_document(results: Results) -> str:
    """Write `sweep.md`, by the template `sweep.md.j2`."""
    entries, cells = results["cells"], map(_cells, results["rows"])
    states = [entry["state"] for entry in entries]
    source = Path(__file__).with_name("sweep.md.j2").read_text(encoding="utf-8")
    template = environment("en").from_string(source)
    first, *others = [variant["settings"].items() for variant in results["variants"].values()] or [()]
    return template.render(
        results,
        shared=[pair for pair in first if others and all(pair in each for each in others)],
        counts=", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
        table=markdown_table(HEADER, [[literal(name), *row] for name, *row in cells]),
        commits=sorted({entry["git_commit"] or "unknown" for entry in entries if "git_commit" in entry}),
        power_laws=power_laws(results["rows"]),
        failures=_failures(results),
    )


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["variant"],
        whole(row["samples"]),
        str(len(row["seeds"]) or MISSING),
        whole(row.get("trained")),
        *(mean_and_spread(row[split]) for split in SPLITS),
        ", ".join(map(str, row.get("best_epochs", []))) or MISSING,
        short(row.get("seconds")),
    ]


def mean_and_spread(values: Sequence[float]) -> str:
    """Format mean and standard deviation."""
    if not values:
        return MISSING
    spread = f" ± {ppl(statistics.stdev(values))}" if len(values) > 1 else ""
    return ppl(statistics.mean(values)) + spread


def _failures(results: Results) -> list[str]:
    """Describe each grid point that did not finish: name, state and reason."""
    return [
        f"{e['variant']}, {counted(e['samples'])}, seed {e['seed']}: {e['state']}. {e['error']}"
        for e in results["cells"]
        if "error" in e
    ]
