"""The written report of one or more runs, as Markdown in English or Japanese.

The text of the report is in two templates, `report.en.md.jinja` and `report.ja.md.jinja`. This module
computes what they show. `ja.json` has the Japanese names of the rows and values of tables.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import UserError
from ..method.config import GPT2_VOCAB_SIZE
from ..runs.steps import REPORTS
from ..runs.summary import Run
from . import tables
from .difference import standard_error

Translate = Callable[[str], str]

HERE = Path(__file__).parent
JAPANESE: dict[str, str] = json.loads((HERE / "ja.json").read_text(encoding="utf-8"))


def write_report(
    runs: Sequence[Run] | Mapping[str, Run], language: str = "en", has_figures: bool = False
) -> str:
    """Write the report of one or more runs as Markdown.

    With more than three runs, tables have one row per run, and only the run with the lowest validation
    perplexity also gets a table of its epochs.

    Args:
        runs: runs, or runs by label. Without labels, runs are called after their folders.
        language: "en" or "ja".
        has_figures: whether the report shows the pictures in the folder `figures` next to the report. The
            report of a single run always shows these pictures.

    Raises:
        UserError: there are no runs, or the language is unknown.
    """
    if not runs or language not in REPORTS:
        raise UserError(
            f"A report needs at least one run, and a language that is {' or '.join(REPORTS)}; language is "
            f"{language!r}."
        )
    names = JAPANESE if language == "ja" else {}

    def t(text: str) -> str:
        # A text without a translation, such as "+4.5 points", is translated word by word.
        return names.get(text) or " ".join(names.get(word, word) for word in text.split(" "))

    templates = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"t": t, "table": lambda frame: markdown(frame, t)}
    template = templates.get_template(f"report.{language}.md.jinja")
    return template.render(_content(tables.labeled(runs)) | {"has_figures": has_figures or len(runs) == 1})


def _content(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Compute what a template shows; each name is a variable of the templates."""
    has_own_plugins = any(run.config.own_plugins for run in runs.values())
    # The original's caches mean nothing if the user has replaced a part of the method.
    cache_rows = (
        {name: tables.CACHES[name] for name in tables.CACHE_FILES} if has_own_plugins else tables.CACHES
    )
    summaries, results = tables.with_original(runs), tables.comparison_table(runs)
    content: dict[str, Any] = {
        "settings": tables.side_by_side(summaries, tables.SETTINGS),
        "phase1": tables.side_by_side(summaries, tables.PHASE1),
        "results": results,
        "memory": tables.memory_table(summaries),
        "caches": tables.side_by_side(summaries, cache_rows),
    }
    described, shown = [*runs], [*summaries]
    shared = None
    if len(runs) > tables.FEW_RUNS:
        described = shown = [min(runs, key=lambda label: runs[label].summary["phase2"]["val_ppl"])]
        settings = content["settings"][[*runs]]
        differs = settings.nunique(axis=1) > 1
        shared = settings[~differs].iloc[:, :1].set_axis(["all runs"], axis=1)
        content = {name: frame.T.rename_axis(columns="Run") for name, frame in content.items()}
        content["settings"] = settings[differs].T.rename_axis(columns="Run") if differs.any() else None
    return content | {
        "runs": [*runs],
        "shared": shared,
        "epochs": {label: tables.epochs_table(summaries[label]) for label in shown},
        "change": _change(runs, results),
        "have_one_text": tables.have_one_text(run.summary for run in runs.values()),
        "described": [_described(label, runs[label].summary) for label in described],
        "has_own_plugins": has_own_plugins,
        "has_phase1": any(run.phase1 for run in runs.values()),
    }


def _change(runs: Mapping[str, Run], results: pd.DataFrame) -> dict[str, str] | None:
    """Return the change from the first run to the last one, or None if they cannot be compared."""
    if "change" not in results:
        return None
    first, *_, last = runs
    times = runs[last].summary["train_tokens"] / runs[first].summary["train_tokens"]
    change = {"ppl": results["change"]["Val PPL"], "acc": results["change"]["Val Acc"]}
    return {"first": first, "last": last, "times": f"{times:,.1f}", **change}


def _described(label: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a run's training ended, whether the model overfitted, and the error of the test."""
    best, end = summary["phase2"], summary["phase2"]["epochs"][-1]
    moved = {name: f"{best[f'{name}_ppl']:,.1f} → {end[f'{name}_ppl']:,.1f}" for name in ("train", "val")}
    overfits = end["train_ppl"] < best["train_ppl"] and end["val_ppl"] > best["val_ppl"]
    tested = summary.get("test", {}).get("conversations", [])
    return {
        "label": label,
        "best": best["best_epoch"],
        "last": end["epoch"],
        "reason": best["stop_reason"],
        "val_ppl": f"{best['val_ppl']:,.1f}",
        "uniform": f"{GPT2_VOCAB_SIZE:,}",
        "is_worse_than_uniform": best["val_ppl"] > GPT2_VOCAB_SIZE,
        "after_best": {**moved, "overfits": overfits} if end["epoch"] > best["best_epoch"] else None,
        "test": {"error": f"{standard_error(tested):.1%}", "count": len(tested)} if len(tested) > 1 else None,
    }


def markdown(table: pd.DataFrame, t: Translate = str) -> str:
    """Format a table of text as Markdown, translated by `t`. Only its first column is left-aligned."""
    rows = [[table.columns.name or "Metric", *table.columns], *table.itertuples(name=None)]
    lines = [" | ".join(t(str(cell)).replace("|", r"\|") for cell in row) for row in rows]
    lines.insert(1, " | ".join(["---", *["---:"] * len(table.columns)]))
    return "\n".join(f"| {line} |" for line in lines)
