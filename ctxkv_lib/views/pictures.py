"""Figures of the method: data, windows, contexts and their memory, attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from ..method.config import ModelConfig
from ..method.windows import Window
from ..progress import counted
from .axes import (
    BLUE,
    INK,
    ORANGE,
    PAPER,
    QUIET,
    RULE,
    integer_x,
    legend_below,
    log_y,
    named_rows,
    panels,
    reference,
    styled,
)
from .explore import AttendedWindow

TICKS = (0, 5, 10, 20, 50, 100, 200, 500)  # of distances, in tokens
MOST_TICKS = 16  # of slots, or of heads
EMPTY = "#b9bec7"  # slots before the stream
PUBLISHED_PASSES = 3


@styled
def token_lengths(lengths: Tensor, label: str = "training conversations") -> Figure:
    """Draw a histogram of conversation lengths, int64 `[num_conversations]`, in tokens, and their mean."""
    figure, (ax,) = panels(1, 3.6)
    values = lengths.numpy()
    bins = min(40, max(5, len(values) // 4), 1 + int(np.ptp(values)))  # none narrower than a token
    ax.hist(values, bins=bins, color=BLUE, edgecolor=PAPER, label=counted(len(values), f" {label}"))
    for value, style, name in ((np.median(values), "-", "median"), (values.mean(), "--", "mean")):
        ax.axvline(value, color=ORANGE, ls=style, label=f"{name}: {value:,.0f} tokens")
    integer_x(ax, "Length (tokens)")
    ax.set(title="Length of a conversation", ylabel="Conversations (count)")
    return legend_below(figure, ax)


@styled
def window_map(model: ModelConfig, positions: Sequence[int], offsets: Sequence[int] | None = None) -> Figure:
    """Draw which positions some positions see: one square per slot, hollow before the stream."""
    figure, (ax,) = panels(1, 1.5 + 0.8 * len(positions))
    slots = Window(model, offsets).slots(torch.tensor(positions))
    square: dict[str, Any] = {"marker": "s", "ls": "none", "ms": 9}
    for row, (position, seen) in enumerate(zip(positions, slots, strict=True)):
        back, real = position - seen, seen >= 0
        ax.plot(back[real], [row] * int(real.sum()), color=BLUE, label=f"{position}: contexts", **square)
        hollow = {**square, "mfc": PAPER, "mec": QUIET, "label": f"{position}: before the stream"}
        ax.plot(back[~real], [row] * int((~real).sum()), **hollow)
        count = counted(int(real.sum()), " contexts")
        note = f"{count}, from position {position:,} back to {seen[real].min():,}"
        ax.annotate(note, (int(back.min()), row), (0, 11), textcoords="offset points", ha="right")
    named_rows(ax, [f"position {position:,}" for position in positions])
    ax.set_ylim(top=-0.75)
    ax.invert_xaxis()
    ax.set_xlabel("Distance back from the position (tokens)")
    ax.set_title("Filled: a context that is attended. Hollow: before the stream.")
    return figure


@styled
def context_clouds(clouds: Mapping[str, Tensor], most: int = 1500) -> Figure:
    """Draw contexts `[n, context_dim]` on their two strongest directions, one panel each.

    Args:
        most: largest number of points of each cloud.
    """
    figure, axes = panels(len(clouds), 4.6, sharex=True, sharey=True, subplot_kw={"aspect": "equal"})
    reach = 0.0
    for ax, (label, contexts) in zip(axes, clouds.items(), strict=True):
        points = contexts[:: -(-len(contexts) // most)].float()
        flat = points @ torch.linalg.svd(points, full_matrices=False).Vh[:2].T  # (n, 2)
        flat = flat * flat.mean(dim=0).sign()
        reach = max(reach, 1.08 * float(flat.abs().max()))
        ax.plot(*flat.T, ".", ms=3, color=BLUE, alpha=0.45, label="contexts")
        ax.plot(*flat.mean(dim=0, keepdim=True).T, "X", ms=12, color=ORANGE, mec=PAPER, label="centroid")
        ax.plot(0, 0, "+", ms=16, mew=2.5, color=INK, label="origin")
        ax.set(title=label, xlabel="Strongest direction (context units)")
    axes[0].set(ylabel="Second direction (context units)", xlim=(-reach, reach), ylim=(-reach, reach))
    return legend_below(figure, axes[0])


@styled
def spectrum(shares: Mapping[str, Tensor]) -> Figure:
    """Draw singular values (% of their sum, log scale) by rank, and name each curve's effective rank."""
    figure, (ax,) = panels(1, 4.2)
    for label, values in shares.items():
        rank = float(torch.special.entr(values).sum().exp())
        name = f"{label}: effective rank {rank:,.0f} of {len(values)} ({rank / len(values):.0%})"
        # LayerNorm removes one direction: the last value is zero up to rounding, and is not drawn.
        ax.plot(range(1, len(values)), 100 * values[:-1], label=name)
    reference(ax.axhline, 100 / max(map(len, shares.values())), "all directions alike (100%)")
    integer_x(ax, "Direction of the context space (largest first)")
    log_y(ax, "Singular value (% of the sum, log scale)")
    ax.set_title("How evenly the contexts use their space")
    return legend_below(figure, ax)


@styled
def pass_curve(errors: Sequence[float]) -> Figure:
    """Draw the mean squared error of parallel passes compared with exact contexts, by pass."""
    figure, (ax,) = panels(1, 4)
    ax.plot(range(1, len(errors) + 1), errors, marker="o", label="mean squared error")
    if len(errors) >= PUBLISHED_PASSES:
        value = errors[PUBLISHED_PASSES - 1]
        name = f"published passes ({PUBLISHED_PASSES}): {value:.2g}"
        ax.plot(PUBLISHED_PASSES, value, "o", ms=12, mfc="none", mew=2.2, color=ORANGE, label=name)
    integer_x(ax, "Parallel passes over the stream (count)")
    log_y(ax, "MSE (context units², log scale)")
    ax.set_title("Parallel passes approach the exact contexts")
    return legend_below(figure, ax)


@styled
def cache_sizes(sizes: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw cache sizes in MiB, `{layout: {cache: MiB}}`, one group of bars per cache."""
    figure, (ax,) = panels(1, 4)
    names = list(next(iter(sizes.values())))
    thick = 0.8 / len(sizes)
    for slot, (label, mib) in enumerate(sizes.items()):
        y = [row + (slot - (len(sizes) - 1) / 2) * thick for row in range(len(names))]
        bars = ax.barh(y, [mib[name] for name in names], height=0.9 * thick, label=label)
        ax.bar_label(bars, fmt="{:,.1f}", padding=4)
    named_rows(ax, names)
    ax.set(xlabel="Size (MiB)", ylabel="Cache")
    ax.margins(x=0.12)
    return legend_below(figure, ax)


@styled
def attention_by_distance(weights: Tensor, offsets: Sequence[int]) -> Figure:
    """Draw mean attention `[num_heads, slots]`: a map by head and slot, and the mean over the heads."""
    figure, (above, below) = panels(2, 6, rows=2)
    heads, slots = weights.shape
    extent = (-0.5, slots - 0.5, heads + 0.5, 0.5)
    shown = above.imshow(100 * weights.numpy(), aspect="auto", cmap="Blues", extent=extent, vmin=0)
    figure.colorbar(shown, ax=above, label="Attention (%)")
    above.set_yticks(range(1, heads + 1, -(-heads // MOST_TICKS)))
    above.set(title="Attention by head and distance", ylabel="Head (number)")
    above.grid(False)
    below.bar(range(slots), 100 * weights.mean(dim=0).numpy(), color=BLUE, label="mean of heads")
    reference(below.axhline, 100 / slots, f"all slots alike: {100 / slots:.1f}%", color=ORANGE)
    below.set_ylabel("Attention (%)")
    for ax in (above, below):
        _slot_axis(ax, offsets)
    return legend_below(figure, below)


@styled
def window_attention(window: AttendedWindow, weights: Tensor, whose: str) -> Figure:
    """Draw attention `[slots]` of one position by distance; slots before the stream in grey; both sums.

    Args:
        whose: the head, or the mean of all heads, for the title.
    """
    figure, (ax,) = panels(1, 3.4)
    real = window.slots >= 0
    for mask, colour, label in ((real, BLUE, "contexts"), (~real, EMPTY, "zero slots, before the stream")):
        if mask.any():
            heights = 100 * weights[mask]
            name = f"{label}: {heights.sum():.1f}% together"
            ax.bar(mask.nonzero().flatten().numpy(), heights.numpy(), color=colour, label=name)
    if (rest := 1 - weights.sum().item()) > 5e-4:
        ax.plot([], [], ls="none", label=f"to no slot, as a sink takes it: {rest:.1%}")
    _slot_axis(ax, (window.position - window.slots).tolist())
    ax.set(title=f"What position {window.position:,} attends: {whose}", ylabel="Attention (%)")
    return legend_below(figure, ax)


def _slot_axis(ax: Axes, back: Sequence[int]) -> None:
    """Space the slots evenly, whatever their distance, and label some with their distance back."""
    named = range(0, len(back), -(-len(back) // MOST_TICKS))
    ax.set_xlim(-0.5, len(back) - 0.5)
    ax.set_xticks(named, [f"{back[slot]:,}" for slot in named])
    ax.set_xlabel("Distance back from the position (tokens), slot by slot")


@styled
def memory_of_contexts(probe: Mapping[str, Any], model: ModelConfig, slots: int = 4) -> Figure:
    """Draw decodability of each token from the slots of a window, and from contexts of the run and of random
    weights.

    Args:
        probe: as in a summary.
        slots: number of intervals to draw; with slots that are not an interval apart, the whole window.
    """
    figure, axes = panels(2, 8.4, rows=2)
    window, context = axes
    _window_memory(window, probe, model, slots)
    blocks = {"this run": probe}
    blocks |= {f"random weights {std}": found for std, found in probe["untrained"].items()}
    for name, found in blocks.items():
        tokens = found["memory_span"]
        span = "no memory span" if tokens is None else f"memory span {counted(tokens, ' tokens')}"
        label = f"{name}: {span}"
        x, style = [1 + row["distance"] for row in found["decodability"]], "-" if found is probe else "--"
        context.plot(x, _explained(found), ls=style, marker="o", label=label)
    context.set(title="Forgetting, in this run and with random weights", xscale="log")
    _distance_ticks(context, 1 + probe["decodability"][-1]["distance"], shift=1)
    context.set_xlabel("Distance back from the context's own token (tokens, log scale)")
    top = 0.05 + max(value for found in blocks.values() for value in _explained(found))
    for ax in axes:
        ax.set(ylabel="Decodability of the token (R²)", ylim=(0, top))
    return legend_below(figure, *axes)


def _window_memory(ax: Axes, probe: Mapping[str, Any], model: ModelConfig, slots: int) -> None:
    """Draw the decodability of each token from the nearest slot that has read it."""
    every, step = probe["offsets"], model.interval
    is_even = every == [slot * step for slot in range(len(every))]
    token = np.arange(slots * step if is_even else model.context_window)  # distance back
    offsets = np.array([offset for offset in every if offset < len(token)])
    slot = np.searchsorted(offsets, token, side="right") - 1  # the nearest slot that has read it
    behind = token - offsets[slot]
    left = np.interp(behind, [row["distance"] for row in probe["decodability"]], _explained(probe))
    reach = -1 if probe["memory_span"] is None else probe["memory_span"]
    ax.fill_between(token, left, step="post", color=BLUE, alpha=0.35, lw=0, label="decodable from the slot")
    outside: dict[str, Any] = {"where": behind > reach, "step": "post", "transform": ax.get_xaxis_transform()}
    beyond = "beyond each slot's memory span (R² ≤ 0.01)"
    ax.fill_between(token, 1, color=RULE, lw=0, zorder=0, label=beyond, **outside)
    ax.plot(offsets, 0 * offsets, "s", ms=7, color=ORANGE, clip_on=False, label="slot", zorder=5)
    ax.set_title(f"{probe['coverage']:.0%} of the window is within some slot's memory span")
    ax.set_xlim(len(token) - 0.5, -0.5)
    integer_x(ax, "Distance back from the position (tokens)")
    if not is_even:  # slot by slot as far as an interval
        ax.set_xscale("symlog", linthresh=step)
        _distance_ticks(ax, len(token))
        ax.set_xlabel(f"Distance back from the position (tokens, log scale beyond {step})")


def _explained(probe: Mapping[str, Any]) -> list[float]:
    """Return the explained share of the variance of a token's embedding, by distance."""
    return [max(0.0, row["r2"]) for row in probe["decodability"]]


def _distance_ticks(ax: Axes, end: int, shift: int = 0) -> None:
    ticks = [tick for tick in TICKS if tick + shift < end]
    ax.set_xticks([tick + shift for tick in ticks], map(str, ticks))
    ax.xaxis.set_minor_locator(NullLocator())
