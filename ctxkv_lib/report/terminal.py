"""What commands print: tables aligned for a terminal."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest
from textwrap import indent
from typing import Any
from unicodedata import east_asian_width

from ..progress import counted
from ..runs.config import GROUPS
from ..runs.listing import Listed
from .info import BYTES
from .labels import span
from .tables import percent, ppl, whole

LARGEST_SHOWN = 1e9  # perplexity of a word; text with few spaces has words of many tokens


def terminal_table(rows: Sequence[Sequence[str]], sides: str = "<") -> str:
    """Align rows of cells.

    Args:
        sides: of the first columns, `<` to the left or `>` to the right; the others are to the right.
    """
    aligned = zip_longest(sides, zip(*rows, strict=True), fillvalue=">")
    columns = [_aligned(cells, side) for side, cells in aligned]
    return "\n".join("   ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _aligned(cells: Sequence[str], side: str) -> list[str]:
    """Pad cells to one width on a terminal, where Japanese characters are two columns wide."""
    wide = [sum(east_asian_width(character) in "WF" for character in cell) for cell in cells]
    width = max(len(cell) + extra for cell, extra in zip(cells, wide, strict=True))
    return [f"{cell:{side}{width - extra}}" for cell, extra in zip(cells, wide, strict=True)]


def format_scores(scores: Mapping[str, Any]) -> str:
    """Format the result of `evaluate_texts`."""
    word_ppl = scores["word_ppl"] or math.inf
    a_word = ppl(word_ppl) if word_ppl < LARGEST_SHOWN else "over a billion"
    lines = [
        f"{counted(scores['conversations'], ' conversations')}, {counted(scores['tokens'], ' tokens')}",
        f"PPL {ppl(scores['ppl'])} a token, {a_word} a word; "
        f"{scores['bits_per_byte']:.3f} bits a byte; accuracy {percent(scores['accuracy'])}",
    ]
    for key, title in {"by_position": "Tokens read before", "by_history": "Contexts in window"}.items():
        rows = [[span(r), whole(r["tokens"]), ppl(r["ppl"]), percent(r["accuracy"])] for r in scores[key]]
        lines += ["", terminal_table([[title, "Tokens", "PPL", "Accuracy"], *rows])]
    return "\n".join(lines)


def format_runs(runs: list[Listed]) -> str:
    """Format `list_runs`; settings come last, as they can be many."""
    names = ["Run", "State", "Preset, recipe", "Tokens", "Best PPL", "MiB", "Settings that differ from these"]
    return terminal_table([names, *map(_cells, runs)], "<<<>>><")


def _cells(run: Listed) -> list[str]:
    tokens = "-" if run.tokens is None else f"{run.tokens:,}"
    best = "-" if run.best_ppl is None else f"{run.best_ppl:,.1f}"
    settings = ", ".join(f"{key}={value}" for key, value in run.settings.items())
    return [str(run.path), run.state, run.kind, tokens, best, f"{run.mib:,.0f}", settings]


def format_info(sizes: dict[str, Any]) -> str:
    """Format `describe`."""
    parameters, cache, dense = sizes["parameters"], sizes["kv_cache"], sizes["caches_dense_fp32_mib"]
    share = parameters["trainable_phase2"] / parameters["total"]
    rows = {
        "Preset, recipe, samples": f"{sizes['preset']}, {sizes['recipe']}, {sizes['samples']:,}",
        "Parameters": f"{parameters['total']:,}",
        "Trainable in Phase 2": f"{parameters['trainable_phase2']:,} ({share:.2%})",
    }
    if cache:
        contexts, kib = counted(cache["contexts"], " contexts"), cache["bytes"] / 1024
        held = f"{contexts}, {kib:,.0f} KiB, however long the text"
        rows |= {"Context window": sizes["slots"], "KV cache of a sequence": held}
    if sizes["train_tokens"]:
        rows["Train tokens"] = f"{sizes['train_tokens']:,}"
    if sizes["train_tokens"] and cache:
        rows["Theoretical max contexts"] = f"{sizes['context_window']['theoretical_max']:,}"
    if dense:
        rows["Validation tokens"] = f"{sizes['val_tokens']:,}"
        rows |= {f"{name} in the original's layout": _mib(size) for name, size in dense.items()}
        totals = {name: sizes[f"caches_{name}_mib"]["total"] for name in BYTES}
        rows |= {f"total in ours, {name}": _mib(total) for name, total in totals.items()}
    elif cache:
        rows["Cache sizes"] = "give --train-tokens and --val-tokens"
    rows |= _size_rows(sizes["computed"]) if sizes["computed"] else {}
    refused = (f"\n`ctxkv run` would refuse this: {why}" for why in sizes["refused"])
    return "\n".join([terminal_table([*rows.items()], "<<"), *refused])


def _mib(size: float) -> str:
    """Format MiB, below 1 as KiB, so that small data do not show as 0."""
    return f"{size:,.0f} MiB" if size >= 1 else f"{size * 1024:,.0f} KiB"


def _gib(size: float, digits: int = 1) -> str:
    """Format GiB, below a tenth as `_mib`."""
    return f"{size:,.{digits}f} GiB" if size >= 0.1 else _mib(size * 1024)


def _size_rows(size: dict[str, Any]) -> dict[str, str]:
    seconds = {name: f"{s:,.0f} s" if s >= 1 else "under 1 s" for name, s in size["epoch_seconds"].items()}
    return {
        "Computed, not measured": f"{size['tokens']:,} training tokens, contexts cached, {size['precision']}",
        "Disk": f"{_gib(size['disk_gib'])}: tokens, training caches, model, checkpoint",
        "Contexts held": f"Phase 1 {_gib(size['phase1_gib'], 2)}, Phase 2 {_gib(size['pool_gib'], 2)}",
        "An epoch of Phase 2": ", ".join(f"{name} {taken}" for name, taken in seconds.items()),
        "Sent by each process in a step": _mib(size["sent_mib"]),
    }


def format_settings(rows: list[dict[str, Any]]) -> str:
    """Format `describe_settings`."""
    found = []
    for concern, group in groupby(rows, lambda row: row["setting"].partition(".")[0]):
        cells = []
        for row in group:
            value = f"{row['setting']} = {row['value']} {row['unit']}".rstrip()
            cells += [[value, row["reason"]], *(["", line] for line in _details(row))]
        about = GROUPS[concern].__doc__ if concern in GROUPS else "Settings of the recipe's plug-in"
        title = f"{concern}: {(about or '').partition('.')[0]}"
        found.append(f"{title}\n{indent(terminal_table(cells, '<<'), '  ')}")
    return "\n\n".join(found)


def _details(row: dict[str, Any]) -> list[str]:
    allowed = [f"allowed: {row['allowed']}"] if row["allowed"] != "any" else []
    meanings = [f"  {name}: {meaning}" for name, meaning in row["meanings"].items() if meaning]
    others = ", ".join(f"{name}: {value}" for name, value in row["elsewhere"].items())
    return [*allowed, *meanings, *([f"with {others}"] if others else [])]
