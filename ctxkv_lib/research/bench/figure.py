"""The measurements of `bench` as one figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...views.axes import INK, OKABE_ITO, log_y, panels

TITLES = {"phase1": "Phase 1: one iteration", "phase2": "Phase 2: one step"}
BARS = {"original": OKABE_ITO[1], "fp32": OKABE_ITO[0], "bf16": OKABE_ITO[2]}


def bench_figure(results: Mapping[str, Any]) -> Figure:
    """Time beside floor of both phases, speed on a long history, and time a token on longer streams."""
    figure, axes = panels(4, size=(11, 8.4), rows=2)
    for ax, (phase, title) in zip(axes, TITLES.items(), strict=False):
        _training(ax, results[phase], title)
    _generation(axes[2], results["generation"])
    _scaling(axes[3], results["scaling"])
    figure.suptitle(results["device"], x=0.01, ha="left", color=INK)
    return figure


def _training(ax: Axes, rows: Mapping[str, Mapping[str, float]], title: str) -> None:
    names = list(rows)
    bars = ax.bar(
        names,
        [row["seconds"] * 1e3 for row in rows.values()],
        width=0.6,
        color=[BARS[name] for name in names],
    )
    ax.bar_label(bars, [_bar_label(row) for row in rows.values()])
    for i, row in enumerate(rows.values()):
        label = "its matrix products alone" if i == 0 else "_not in the legend"
        ax.hlines(row["floor_seconds"] * 1e3, i - 0.38, i + 0.38, color=INK, lw=2, label=label)
    ax.set_ylabel("Time (ms)")
    ax.set_title(title, loc="left", weight="bold")
    ax.margins(y=0.25)
    ax.legend(frameon=False)


def _bar_label(row: Mapping[str, float]) -> str:
    return f"{row['seconds'] * 1e3:,.0f} ms: {row['ratio']:.1f}x\npeak {row['peak_mib']:,.0f} MiB"


def _generation(ax: Axes, rows: Sequence[Mapping[str, float]]) -> None:
    histories = [row["history"] for row in rows]
    models = {"ours": "Context-KV", "gpt2": "GPT-2 block, key-value cache"}
    for colour, (name, title), above in zip(OKABE_ITO, models.items(), (7, -16), strict=False):
        speeds = [row[f"{name}_tokens_per_second"] for row in rows]
        ax.plot(histories, speeds, color=colour, lw=2, marker="o", label=title)
        for history, speed, row in zip(histories, speeds, rows, strict=True):
            held = f"{row[f'{name}_cache_bytes'] / 2**20:,.1f} MiB"
            ax.annotate(
                held, (history, speed), (0, above), textcoords="offset points", ha="center", color=colour
            )
    ax.set_xscale("log")
    ax.set_xticks(histories, [f"{history:,}" for history in histories], minor=False)
    ax.minorticks_off()
    ax.margins(x=0.15)
    ax.set_ylim(0, 1.12 * ax.dataLim.ymax)
    ax.set_xlabel("Tokens of history (log scale); beside each point: what the cache holds")
    ax.set_ylabel("Tokens a second, one by one")
    ax.set_title("Generation", loc="left", weight="bold")
    ax.legend(frameon=False)


def _scaling(ax: Axes, rows: Sequence[Mapping[str, float]]) -> None:
    tokens = [row["tokens"] for row in rows]
    series = {
        "phase2_us": "Phase 2 step",
        "phase1_us": "Phase 1 iteration",
        "contexts_us": "exact contexts",
        "streamed_us": "streamed contexts",
    }
    for colour, (key, label) in zip(OKABE_ITO, series.items(), strict=False):
        ax.plot(tokens, [row[key] for row in rows], color=colour, lw=2, marker="o", label=label)
    ax.set_xscale("log")
    ax.set_xticks(tokens, [f"{count:,}" for count in tokens], minor=False)
    ax.minorticks_off()
    ax.set_xlabel("Tokens of the stream (log scale)")
    log_y(ax, "Time a token (µs, log scale)")
    ax.set_title("Ours on longer streams, fp32", loc="left", weight="bold")
    ax.legend(frameon=False)
