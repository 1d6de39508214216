"""Names of runs, of stages and of bins, in tables and figures."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..progress import counted


def run_labels(
    summaries: Iterable[Mapping[str, Any]], unit: str = " samples", others: Sequence[str] = ()
) -> list[str]:
    """Name each run by its samples and its entry of `others`, and if need be by a number."""
    names = [counted(summary["samples"], unit) for summary in summaries]
    if others:
        names = [", ".join(filter(None, pair)) for pair in zip(names, others, strict=True)]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def memory_stages(memory: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the stages of a run with names, of its epochs only the first and the last."""
    epochs = [stage for stage in memory if stage["stage"].startswith("epoch ")]
    kept = [dict(stage) for stage in memory if stage not in epochs]
    if epochs:
        kept.append({**epochs[0], "stage": "first epoch"})
    if len(epochs) > 1:
        kept.append({**epochs[-1], "stage": "last epoch"})
    return kept


def span(row: Mapping[str, Any]) -> str:
    """Format the range of a bin: 0, 1–9, 640+."""
    if row["to"] is None:
        return f"{row['from']:,}+"
    return f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,}–{row['to']:,}"
