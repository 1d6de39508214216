"""Figures that explain: data, windows, contexts, attention and settings, as the notebooks show them.

Made like those in `figures`: loaded numbers in, a matplotlib `Figure` out, no pyplot.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

from ..method.config import ModelConfig
from ..method.windows import slot_offsets, slot_positions
from .axes import INK, OKABE_ITO, PAPER, QUIET, RULE, colours, integer_x, legend_below, log_y, panels, plain
from .diagram import PASSED
from .explore import Window

TICKS = (20, 50, 100, 200, 500)  # of distances, in tokens
MOST_TICKS = 16  # of slots, or of heads
BLUE, ORANGE = OKABE_ITO[:2]
# White to the palette's blue to near black: brightness alone tells the values.
STRENGTH = LinearSegmentedColormap.from_list("strength", [PAPER, OKABE_ITO[5], BLUE, "#002a44"])
PUBLISHED_PASSES = 3


def token_lengths(lengths: Tensor, label: str = "training conversations") -> Figure:
    """Histogram of conversation lengths, int64 `[num_conversations]` in tokens; median and mean marked."""
    figure, (ax,) = panels(1, size=(8.4, 3.6))
    values = lengths.numpy()
    bins = min(40, max(5, len(values) // 4))
    ax.hist(values, bins=bins, color=BLUE, edgecolor=PAPER, label=f"{len(values)} {plain(label)}")
    for value, style, name in ((np.median(values), "-", "median"), (values.mean(), "--", "mean")):
        ax.axvline(value, color=ORANGE, ls=style, lw=2, label=f"{name}: {value:,.0f} tokens")
    integer_x(ax, "Length (tokens)")
    ax.set_ylabel("Conversations (count)")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_title("Length of a conversation", loc="left", weight="bold")
    legend_below(figure, ax)
    return figure


def window_map(model: ModelConfig, positions: Sequence[int]) -> Figure:
    """Which positions some positions see: a square a slot, hollow where it lies before the stream."""
    figure, (ax,) = panels(1, size=(9.6, 1.5 + 0.8 * len(positions)))
    slots = slot_positions(torch.tensor(positions), model)
    for row, (position, seen) in enumerate(zip(positions, slots, strict=True)):
        back, real = (position - seen).numpy(), (seen >= 0).numpy()
        square: dict[str, Any] = {"marker": "s", "ls": "none", "ms": 9}
        ax.plot(back[real], [row] * real.sum(), color=BLUE, label=f"{position}: contexts", **square)
        empty = {**square, "mfc": PAPER, "mec": QUIET}
        ax.plot(back[~real], [row] * (~real).sum(), label=f"{position}: before the stream", **empty)
        oldest = int(seen[real].min())
        note = f"{real.sum()} contexts, from position {position:,} back to {oldest:,}"
        ax.annotate(note, (back.min(), row), (0, 11), textcoords="offset points", ha="right")
    ax.set_yticks(range(len(positions)), [f"position {position:,}" for position in positions])
    ax.set_ylim(len(positions) - 0.5, -0.75)
    ax.invert_xaxis()
    ax.set_xlabel("Distance back from the position (tokens)")
    ax.set_title("Filled: a context that is attended. Hollow: before the stream.", loc="left", weight="bold")
    ax.grid(False, axis="y")
    return figure


def context_clouds(clouds: Mapping[str, Tensor], most: int = 1500) -> Figure:
    """Contexts `[n, context_dim]` on their two strongest directions, one panel each.

    Args:
        most: so many points of each cloud at most.
    """
    figure, axes = panels(len(clouds), size=(9.6, 4.6), sharex=True)
    reach = 0.0
    for ax, (label, contexts) in zip(axes, clouds.items(), strict=True):
        points = contexts[:: -(-len(contexts) // most)].float()
        flat = points @ torch.linalg.svd(points, full_matrices=False).Vh[:2].T  # (n, 2)
        flat = flat * flat.mean(dim=0).sign()
        centre = flat.mean(dim=0)
        reach = max(reach, float(flat.abs().max()))
        ax.plot(*flat.T.numpy(), ".", ms=3, color=BLUE, alpha=0.45, label="contexts")
        ax.plot(*centre.numpy(), "X", ms=12, color=ORANGE, mec=PAPER, label="centroid")
        ax.plot(0, 0, "+", ms=16, mew=2.5, color=INK, label="origin")
        ax.set_title(plain(label), loc="left", weight="bold")
        ax.set_xlabel("Strongest direction (context units)")
    axes[0].set_ylabel("Second direction (context units)")
    for ax in axes:
        ax.set(xlim=(-1.08 * reach, 1.08 * reach), ylim=(-1.08 * reach, 1.08 * reach), aspect="equal")
    legend_below(figure, axes[0])
    return figure


def memory_of_contexts(probe: Mapping[str, Any], model: ModelConfig, slots: int = 4) -> Figure:
    """What contexts still hold of each token, and what that leaves of a window seen through its slots.

    Args:
        probe: as in a summary.
        slots: so many intervals back are drawn; where slots are not an interval apart, the whole window.
    """
    figure, (seen, alone) = panels(2, size=(12, 4.6))
    reach = -1 if probe["horizon"] is None else probe["horizon"]
    is_even = model.slots == "uniform"
    token = np.arange(slots * model.interval if is_even else model.context_window)  # distance back
    offsets = np.array([offset for offset in slot_offsets(model) if offset < len(token)])
    behind = token - offsets[np.searchsorted(offsets, token, side="right") - 1]  # the slot that saw it last
    row = probe["recall"]
    left = np.interp(behind, [r["distance"] for r in row], [100 * max(0, r["r2"]) for r in row])
    for first, last in pairwise([*offsets, len(token)]):
        place, part = [*token[first:last], last], [*left[first:last], left[last - 1]]
        held = "" if first else "held by a slot"
        seen.fill_between(place, part, color=BLUE, alpha=0.35, lw=0, label=held)
        seen.plot(place, part, color=BLUE, lw=1.5)
        blind = (first + reach + 0.5, last - 0.5)
        if blind[0] < blind[1]:
            unseen = "held by none" if "held by none" not in seen.get_legend_handles_labels()[1] else ""
            seen.axvspan(*blind, color=RULE, lw=0, zorder=0, label=unseen)
    seen.plot(offsets, 0 * offsets, "s", ms=7, color=ORANGE, clip_on=False, label="slot", zorder=5, ls="none")
    seen.set_xlim(len(token) - 0.5, -0.5)
    scale = "" if is_even else f", log scale beyond {model.interval}"
    seen.set_xlabel(f"Distance back from the position (tokens{scale})")
    if not is_even:  # slot by slot as far as an interval
        seen.set_xscale("symlog", linthresh=model.interval)
        ticks = [tick for tick in (0, 5, 10, *TICKS) if tick < len(token)]
        seen.set_xticks(ticks, map(str, ticks))
        seen.xaxis.set_minor_locator(NullLocator())
    seen.set_title(f"{probe['coverage']:.0%} of the window is held by some slot", loc="left", weight="bold")
    blocks = {"trained": probe, **{f"fresh, weights {std}": one for std, one in probe["fresh"].items()}}
    for colour, (name, one) in zip(colours(blocks), blocks.items(), strict=True):
        x = [1 + r["distance"] for r in one["recall"]]
        held = "none" if one["horizon"] is None else f"{one['horizon']} tokens"
        label = f"{name}: remembers {held}; mean of the last {model.interval}: R² {one['mean_recall']:.2f}"
        y = [100 * max(0, r["r2"]) for r in one["recall"]]
        style = "-" if one is probe else "--"
        alone.plot(x, y, color=colour, lw=2.2, ls=style, marker="o", ms=3.5, label=label)
    alone.set_xscale("log")
    alone.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value - 1:,.0f}"))
    alone.set_xticks([1 + tick for tick in (0, 1, 2, 5, 10, *TICKS) if tick < x[-1]])
    alone.xaxis.set_minor_locator(NullLocator())
    alone.set_xlabel("Distance back from the context's own token (tokens, log scale)")
    alone.set_title("Forgetting, trained and fresh", loc="left", weight="bold")
    for ax in (seen, alone):
        ax.set_ylabel("Of the token's embedding (% of variance, R²)")
        ax.set_ylim(0, 100 * max(r["r2"] for one in blocks.values() for r in one["recall"]) + 5)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "frameon": False}
        ax.legend(**below, ncols=3 if ax is seen else 1)
    return figure


def spectrum(shares: Mapping[str, Tensor]) -> Figure:
    """Singular values (% of their sum, log scale) by rank, and each curve's effective rank."""
    figure, (ax,) = panels(1, size=(8.4, 4.2))
    for colour, (label, values) in zip(colours(shares), shares.items(), strict=True):
        rank = float(torch.special.entr(values).sum().exp())
        name = f"{plain(label)}: effective rank {rank:,.0f} of {len(values)} ({rank / len(values):.0%})"
        ax.plot(range(1, len(values) + 1), 100 * values.numpy(), color=colour, lw=2.2, label=name)
    widest = max(map(len, shares.values()))
    ax.axhline(100 / widest, color=QUIET, ls="--", lw=1.2, label="all directions alike (100%)")
    integer_x(ax, "Direction of the context space (largest first)")
    # LayerNorm takes one direction away: the last value is zero but for rounding, and stays off the page.
    ax.set_ylim(bottom=50 * min(float(values[:-1].min()) for values in shares.values()))
    log_y(ax, "Singular value (% of the sum, log scale)")
    ax.set_title("How evenly the contexts use their space", loc="left", weight="bold")
    legend_below(figure, ax)
    return figure


def pass_curve(errors: Sequence[float]) -> Figure:
    """Mean squared error of parallel passes against the one-by-one contexts; the original's three marked."""
    figure, (ax,) = panels(1, size=(8.4, 4))
    passes = range(1, len(errors) + 1)
    ax.plot(passes, errors, color=BLUE, lw=2.2, marker="o", ms=4, label="mean squared error")
    if len(errors) >= PUBLISHED_PASSES:
        value = errors[PUBLISHED_PASSES - 1]
        ring: dict[str, Any] = {"ms": 12, "mfc": "none", "mew": 2.2, "color": ORANGE}
        name = f"published passes ({PUBLISHED_PASSES}): {value:.2g}"
        ax.plot(PUBLISHED_PASSES, value, "o", label=name, **ring)
    ax.set_yscale("log")
    integer_x(ax, "Parallel passes over the stream (count)")
    ax.set_ylabel("Mean squared error (context units², log scale)")
    ax.set_title("Parallel passes approach the one-by-one contexts", loc="left", weight="bold")
    legend_below(figure, ax)
    return figure


def cache_sizes(sizes: Mapping[str, Mapping[str, float]]) -> Figure:
    """Cache sizes in MiB, `{layout: {cache: MiB}}`, a group of bars a cache."""
    figure, (ax,) = panels(1, size=(8.4, 4))
    names = list(next(iter(sizes.values())))
    thick = 0.8 / len(sizes)
    for slot, (colour, (label, mib)) in enumerate(zip(colours(sizes), sizes.items(), strict=True)):
        y = [row + (slot - (len(sizes) - 1) / 2) * thick for row in range(len(names))]
        bars = ax.barh(y, [mib[name] for name in names], height=0.9 * thick, color=colour, label=plain(label))
        ax.bar_label(bars, [f"{mib[name]:,.1f}" for name in names], padding=4)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel("Size (MiB)")
    ax.set_ylabel("Cache")
    ax.margins(x=0.12)
    ax.grid(False, axis="y")
    legend_below(figure, ax)
    return figure


def attention_by_distance(weights: Tensor, model: ModelConfig) -> Figure:
    """Mean attention `[num_heads, slots]`: a map by head and slot, and the mean over the heads."""
    figure, (above, below) = panels(2, size=(9.6, 6), rows=2)
    heads, slots = weights.shape
    extent = (-0.5, slots - 0.5, heads + 0.5, 0.5)
    shown = above.imshow(100 * weights.numpy(), aspect="auto", cmap=STRENGTH, extent=extent, vmin=0)
    figure.colorbar(shown, ax=above, label="Attention (%)")
    above.set_yticks(range(1, heads + 1, -(-heads // MOST_TICKS)))
    above.set_ylabel("Head (number)")
    above.grid(False)
    above.set_title("Attention by head and distance", loc="left", weight="bold")
    below.bar(range(slots), 100 * weights.mean(dim=0).numpy(), width=0.8, color=BLUE, label="mean of heads")
    even = 100 / slots
    below.axhline(even, color=ORANGE, ls="--", lw=1.6, label=f"all slots alike: {even:.1f}%")
    below.set_ylabel("Attention (%)")
    legend_below(figure, below)
    for ax in (above, below):
        _slot_axis(ax, slot_offsets(model))
    return figure


def _slot_axis(ax: Axes, back: Sequence[int]) -> None:
    """A place for each slot, however far they lie apart, with how far back it is."""
    named = range(0, len(back), -(-len(back) // MOST_TICKS))
    ax.set_xlim(-0.5, len(back) - 0.5)
    ax.set_xticks(named, [f"{back[slot]:,}" for slot in named])
    ax.set_xlabel("Distance back from the position (tokens), slot by slot")


def window_attention(window: Window, weights: Tensor) -> Figure:
    """Attention `[slots]` of one position by distance; slots before the stream in grey, with their sum."""
    figure, (ax,) = panels(1, size=(9.6, 3.3))
    real = window.slots >= 0
    for mask, colour, label in ((real, BLUE, "contexts"), (~real, PASSED, "zero slots, before the stream")):
        if mask.any():
            heights = 100 * weights[mask].numpy()
            name = f"{label}: {heights.sum():.1f}% together"
            ax.bar(mask.nonzero().flatten().numpy(), heights, color=colour, label=name)
    _slot_axis(ax, (window.position - window.slots).tolist())
    ax.set_ylabel("Attention (%)")
    ax.set_title(f"What position {window.position:,} attends", loc="left", weight="bold")
    legend_below(figure, ax)
    return figure


def overfitting(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Validation PPL over training PPL by epoch, `{label: epochs of a summary}`; 1 is no gap."""
    figure, (ax,) = panels(1, size=(8.4, 4))
    for colour, (label, epochs) in zip(colours(runs), runs.items(), strict=True):
        known = [line for line in epochs if line["val_ppl"] is not None]
        ratios = [line["val_ppl"] / line["train_ppl"] for line in known]
        ax.plot(
            [line["epoch"] for line in known],
            ratios,
            color=colour,
            lw=2.2,
            marker="o",
            ms=4,
            label=plain(label),
        )
    ax.axhline(1, color=QUIET, ls="--", lw=1.2, label="no gap")
    integer_x(ax, "Epoch (passes over the training tokens)")
    ax.set_ylabel("Validation PPL / train PPL (ratio)")
    ax.set_title("Overfitting: the gap between text seen and unseen", loc="left", weight="bold")
    legend_below(figure, ax)
    return figure
