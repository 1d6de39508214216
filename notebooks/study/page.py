"""Tables and figures of the study's two pages on the site."""

from itertools import groupby
from pathlib import Path
from typing import Any

import continuous_cache
import search
from comparisons import Change, Pair
from continuous_cache import results
from ctxkv_lib.research.sweep_table import mean_and_spread
from ctxkv_lib.views.power_laws import SPLITS
from ctxkv_lib.views.study import sweep_figure

import ctxkv_lib as ctxkv
from ctxkv_lib.files import read_json
from ctxkv_lib.views.markup import show_html, table

HERE = Path(__file__).parent
KINDS = ("model", "unigram cache", "continuous cache")  # of caches, without and with


def spread(values: list[float]) -> str:
    """Format mean and standard deviation on one line."""
    return mean_and_spread(values).replace(" ", "\u00a0")


def perplexities(part: str, split: str = "test_ppl") -> Any:
    """Make a row for each variant in the protocol's order, then n-grams; a column for each sample count.

    A cell is empty if nothing has run, and has no ± with one seed.
    """
    rows = results(part)["rows"]
    counts = sorted({row["samples"] for row in rows})
    found = {(row["variant"], row["samples"]): spread(row[split]) for row in rows}
    protocol = read_json(HERE / f"{part}.json")
    ngrams = dict.fromkeys(row["variant"] for row in rows if not row["seeds"])
    names = [*protocol["variants"], *ngrams]
    cells = [[name, *(found.get((name, count), "") for count in counts)] for name in names]
    held_out = SPLITS[split].lower()
    size = protocol.get("settings", {}).get(f"data.{held_out}_samples", 10)  # as of preset `offline`
    title = f"PPL on {size} {held_out} conversations, by training conversations"
    return show_html(table([title, *(f"{count:,}" for count in counts)], cells))


def figure(part: str, split: str, count: int) -> None:
    """Draw one split of a part, with one sample count."""
    found = results(part)
    rows = [row for row in found["rows"] if row["samples"] == count]
    other = {name: [] for name in SPLITS if name != split}
    ctxkv.show(sweep_figure({**found, "rows": [{**row, **other} for row in rows]}))


def beside_the_original() -> Any:
    """Make the original's four rows, for the original and for each recipe that repeats it."""
    found = results("full")
    tokens = {row["samples"]: row["train_tokens"] for row in found["rows"]}
    trained = {"the original": ctxkv.PUBLISHED}
    for recipe in ("published", "exact"):
        trained[recipe] = {
            cell["samples"]: {
                "samples": cell["samples"],
                "train_tokens": tokens[cell["samples"]],
                "phase2": {**cell, "train_val_ratio": cell["val_ppl"] / cell["train_ppl"]},
            }
            for cell in found["cells"]
            if cell["variant"] == recipe
        }
    tables = {name: ctxkv.compared([runs[100], runs[500]]) for name, runs in trained.items()}
    rows = [[f"{name}: {row[0]}", *row[1:]] for name, shown in tables.items() for row in shown[1:]]
    return show_html(table(tables["exact"][0], rows))


def searched() -> Any:
    """Make a row for all settings that the search of `fair` tried, a column for each variant."""
    runs = [(run["row"], tuple(run["settings"].values()), run) for run in search.found()]
    found = {(name, tried): f"{run['val_ppl']:.1f}\u00a0({run['best_epoch']})" for name, tried, run in runs}
    names = sorted({name for name, _, _ in runs})
    cells = [
        [", ".join(map(str, tried)), *(found.get((name, tried), "") for name in names)]
        for tried in sorted({tried for _, tried, _ in runs})
    ]
    title = "val PPL (best epoch), by learning rate, epochs, weight decay, layer dropout"
    return show_html(table([title, *names], cells))


def compared(*found: dict[Pair, dict[int, Change]]) -> Any:
    """Make a row for each pair, a column for each sample count: change, interval, that of other draws."""
    counts = sorted({count for row in found[0].values() for count in row})
    cells = []
    for own, other in found[0]:
        cells.append([f"{own}, compared with {other}"])
        for count in counts:
            drawn = [each[own, other][count] for each in found if count in each[own, other]]
            held = "; ".join(f"{_short(low)}\u00a0to\u00a0{_short(high)}" for _, low, high in drawn)
            cells[-1].append(f"{_short(drawn[0][0])}% ({held})" if drawn else "")
    title = "change of the test PPL, by training conversations"
    return show_html(table([title, *(f"{count:,}" for count in counts)], cells))


def _short(percent: float) -> str:
    return f"{percent:.{0 if abs(percent) >= 10 else 1}f}"


def cached(part: str, kinds: tuple[str, ...] = KINDS) -> Any:
    """Make a row for each variant and sample count: test PPL without a cache and with some kinds."""
    cells = []
    runs = continuous_cache.found(part)
    for (variant, samples), group in groupby(runs, key=lambda run: (run["variant"], run["samples"])):
        seeds = list(group)
        rows = [run["rows"] for run in seeds]
        ppls = [spread([row[kind]["test_ppl"] for row in rows if kind in row]) for kind in kinds]
        percent, low, high = continuous_cache.change(seeds, "continuous cache")
        interval = f"{percent:.0f}% ({low:.0f} to {high:.0f})"
        cells.append([f"{variant.removesuffix('Mixer')}, {samples:,}", *ppls, interval])
    header = ["test PPL, by conversations", "no cache", *kinds[1:], "change by a continuous cache"]
    return show_html(table(header, cells))
