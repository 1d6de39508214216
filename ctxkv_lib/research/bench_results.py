"""The measurements of `ctxkv bench` as text for a terminal and as one figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.tables import terminal_table
from ..views.axes import INK, OKABE_ITO, log_y, panels

Row = Mapping[str, float]

PHASES = {"phase1": "Phase 1, one iteration", "phase2": "Phase 2, one step"}
COLUMNS = ("ms", "times as fast", "times floor", "peak MiB", "loss differs by")
MODELS = {"ours": "Context-KV", "gpt2": "GPT-2 block"}
# Lines of a table: name, key in the results and format.
SCALING = [
    ("Phase 1 iteration, µs a token", "phase1_us", ",.1f"),
    ("Exact contexts, µs a token", "contexts_us", ",.1f"),
    ("Phase 2 step, µs a token", "phase2_us", ",.1f"),
    ("Streamed contexts, µs a token", "streamed_us", ",.1f"),
    ("Caches, bytes a token", "cache_bytes", ",.1f"),
    ("Streamed contexts, share of an epoch", "streamed_share", ".1%"),
]
GENERATION = [
    (f"{model}, {what}", f"{name}_{key}", form)
    for what, key, form in (
        ("tokens a second", "tokens_per_second", ",.1f"),
        ("cache bytes a position", "bytes_per_position", ",.0f"),
        ("seconds to read it all", "prefill_seconds", ",.4f"),
    )
    for name, model in MODELS.items()
]
COLOURS = {"original": OKABE_ITO[1], "fp32": OKABE_ITO[0], "bf16": OKABE_ITO[2]}


def bench_table(results: Mapping[str, Any]) -> str:
    """Format the results for a terminal; `bench.json` has the same and more."""
    rates = results["product_gflop_per_second"]
    products = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    lines = [
        f"{results['device']}, torch {results['versions']['torch']}; matrix products, GFLOP/s: {products}",
        f"{results['tokens']:,} tokens of {results['samples']:,} conversations, preset {results['preset']}; "
        f"medians of {results['rounds']}",
    ]
    for phase, title in PHASES.items():
        rows = [[name, *_training_cells(row)] for name, row in results[phase].items()]
        lines += ["", terminal_table([[title, *COLUMNS], *rows])]
    epochs = results["published_epoch_seconds"]
    computed = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in epochs.items())
    lines.append(f"An epoch of the published 500-sample run at this rate (computed): {computed}")
    lines += ["", _by_column("Ours, fp32, by tokens of the stream", "tokens", results["scaling"], SCALING)]
    title = "One token more, by tokens of history"
    lines += ["", _by_column(title, "history", results["generation"], GENERATION)]
    return "\n".join(lines)


def _training_cells(row: Row) -> list[str]:
    return [
        f"{row['seconds'] * 1e3:,.1f}",
        f"{row['ratio']:.2f}x",
        f"{1 / row['floor_share']:.2f}x",
        f"{row['peak_mib']:,.0f}",
        f"{row['loss_difference']:.1e}" if row["loss_difference"] else "",
    ]


def _by_column(title: str, key: str, rows: Sequence[Row], lines: Sequence[tuple[str, str, str]]) -> str:
    """A table with a column for each of `rows`, headed by its `key`."""
    body = [[name, *(format(row[known], form) for row in rows)] for name, known, form in lines]
    return terminal_table([[title, *(f"{row[key]:,}" for row in rows)], *body])


def bench_figure(results: Mapping[str, Any]) -> Figure:
    """Draw time beside floor of both phases, speed on a long history, and time a token on longer streams."""
    figure, axes = panels(4, size=(11, 8.4), rows=2)
    for ax, (phase, title) in zip(axes, PHASES.items(), strict=False):
        _training(ax, results[phase])
        ax.set_title(title, loc="left", weight="bold")
    rows = results["generation"]
    _lines(axes[2], rows, "history", {f"{name}_tokens_per_second": title for name, title in MODELS.items()})
    for name, above in zip(MODELS, (7, -16), strict=True):
        for row in rows:
            at = (row["history"], row[f"{name}_tokens_per_second"])
            held = f"{row[f'{name}_cache_bytes'] / 2**20:,.1f} MiB"
            axes[2].annotate(held, at, (0, above), textcoords="offset points", ha="center")
    axes[2].set_ylim(0, 1.12 * axes[2].dataLim.ymax)
    axes[2].set_xlabel("Tokens of history (log scale); beside each point: size of the cache")
    axes[2].set_ylabel("Tokens a second, one by one")
    axes[2].set_title("Generation", loc="left", weight="bold")
    times = {key: name.partition(",")[0] for name, key, _ in SCALING if key.endswith("_us")}
    _lines(axes[3], results["scaling"], "tokens", times)
    axes[3].set_xlabel("Tokens of the stream (log scale)")
    log_y(axes[3], "Time a token (µs, log scale)")
    axes[3].set_title("Ours on longer streams, fp32", loc="left", weight="bold")
    figure.suptitle(results["device"], x=0.01, ha="left", color=INK)
    return figure


def _training(ax: Axes, rows: Mapping[str, Row]) -> None:
    bars = ax.bar(
        list(rows),
        [row["seconds"] * 1e3 for row in rows.values()],
        width=0.6,
        color=[COLOURS[name] for name in rows],
    )
    labels = [
        f"{row['seconds'] * 1e3:,.0f} ms: {row['ratio']:.1f}x\npeak {row['peak_mib']:,.0f} MiB"
        for row in rows.values()
    ]
    ax.bar_label(bars, labels)
    for place, row in enumerate(rows.values()):
        label = "" if place else "its matrix products alone"
        ax.hlines(row["floor_seconds"] * 1e3, place - 0.38, place + 0.38, color=INK, lw=2, label=label)
    ax.set_ylabel("Time (ms)")
    ax.margins(y=0.25)
    ax.legend(frameon=False)


def _lines(ax: Axes, rows: Sequence[Row], key: str, series: Mapping[str, str]) -> None:
    """A line for each of `series`, `{key in rows: label}`, over `key`, whose values get the ticks."""
    at = [row[key] for row in rows]
    for colour, (name, label) in zip(OKABE_ITO, series.items(), strict=False):
        ax.plot(at, [row[name] for row in rows], color=colour, lw=2, marker="o", label=label)
    ax.set_xscale("log")
    ax.set_xticks(at, [f"{value:,}" for value in at], minor=False)
    ax.minorticks_off()
    ax.margins(x=0.15)
    ax.legend(frameon=False)
