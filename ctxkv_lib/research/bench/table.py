"""The measurements of `bench` as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...report.tables import terminal_table

TITLES = {"phase1": "Phase 1, one iteration", "phase2": "Phase 2, one step"}
COLUMNS = ("ms", "times as fast", "times floor", "peak MiB", "loss differs by")


def bench_table(results: Mapping[str, Any]) -> str:
    """Lines for people; `bench.json` has the same and more."""
    rates = results["product_gflop_per_second"]
    products = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    lines = [
        f"{results['device']}, torch {results['versions']['torch']}; matrix products, GFLOP/s: {products}",
        f"{results['tokens']:,} tokens of {results['samples']:,} conversations, preset {results['preset']}; "
        f"medians of {results['rounds']}",
    ]
    for phase, title in TITLES.items():
        rows = [[name, *_training_cells(row)] for name, row in results[phase].items()]
        lines += ["", terminal_table([[title, *COLUMNS], *rows])]
    epochs = results["published_epoch_seconds"]
    computed = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in epochs.items())
    lines.append(f"An epoch of the published 500-sample run at this rate (computed): {computed}")
    lines += ["", terminal_table(_scaling(results["scaling"]))]
    lines += ["", terminal_table(_generation(results["generation"]))]
    return "\n".join(lines)


def _training_cells(row: Mapping[str, float]) -> list[str]:
    return [
        f"{row['seconds'] * 1e3:,.1f}",
        f"{row['ratio']:.2f}x",
        f"{1 / row['floor_share']:.2f}x",
        f"{row['peak_mib']:,.0f}",
        f"{row['loss_difference']:.1e}" if row["loss_difference"] else "",
    ]


def _scaling(rows: Sequence[Mapping[str, float]]) -> list[list[str]]:
    names = {
        "Phase 1 iteration, us a token": "phase1_us",
        "Exact contexts, us a token": "contexts_us",
        "Phase 2 step, us a token": "phase2_us",
        "Streamed contexts, us a token": "streamed_us",
        "Caches, bytes a token": "cache_bytes",
    }
    cells = [[name, *(f"{row[key]:,.1f}" for row in rows)] for name, key in names.items()]
    shares = [f"{row['streamed_share']:.1%}" for row in rows]
    cells.append(["Their share of an epoch", *shares])
    return [["Ours, fp32, by tokens of the stream", *(f"{row['tokens']:,}" for row in rows)], *cells]


def _generation(rows: Sequence[Mapping[str, float]]) -> list[list[str]]:
    models = {"ours": "Context-KV", "gpt2": "GPT-2 block"}
    cells = [
        [f"{title}, tokens a second", *(f"{row[f'{name}_tokens_per_second']:,.1f}" for row in rows)]
        for name, title in models.items()
    ]
    cells += [
        [f"{title}, cache bytes a position", *(f"{row[f'{name}_bytes_per_position']:,.0f}" for row in rows)]
        for name, title in models.items()
    ]
    cells += [
        [
            f"{title}, ms to read it all",
            *(f"{row[f'{name}_prefill_seconds'] * 1e3:,.1f}" for row in rows),
        ]
        for name, title in models.items()
    ]
    return [["One token more, by tokens of history", *(f"{row['history']:,}" for row in rows)], *cells]
