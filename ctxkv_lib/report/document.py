"""The written report of one or more runs, as Markdown in English or Japanese.

Every claim is computed from the runs. `ja.json` has the Japanese of every text; what it lacks stays English.
"""

import html
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import UserError
from ..runs.folder import Run
from . import tables

Translate = Callable[..., str]  # a text, and values for its places

LANGUAGES = ("en", "ja")
JAPANESE: dict[str, str] = json.loads(Path(__file__).with_name("ja.json").read_text(encoding="utf-8"))
ORIGINAL = (
    "The original: report *Context-KV Attention, 500 samples* of 2025-12-03, repository "
    "[rato-tokyo/new-llm](https://github.com/rato-tokyo/new-llm)."
)
COMPARABLE = "Its columns have the numbers of its runs on an NVIDIA L4; a dash was not published."
NOT_COMPARABLE = "Data, model or training settings differ: its numbers cannot be compared with these."
ENDED = "{name}: val PPL was lowest at epoch {best}; training ended at epoch {last} ({reason})."
OVERFITTING = "{name}: since its best epoch train PPL {train}, val PPL {val}: {judgement}."
CHANGED = "From {first} to {last}: {times} times the training tokens, val PPL {ppl}, val acc {acc} points."
TEST_ERROR = "{name}: the test PPL has a standard error of ±{error} over {count} test conversations."
PROPOSALS = (
    "Longer interval: 20 to 50 or 100 (`--set model.interval=50`).",
    "More data: 500 to 1,000 or 2,000 samples (`--samples 1000`).",
    "Regularisation: more dropout and weight decay (`--set model.attention_dropout=0.2`).",
    "More contexts: 32 to 64 (`--set model.max_contexts=64`).",
)


def write_report(runs: Sequence[Run], language: str = "en", has_figures: bool | None = None) -> str:
    """Write the report of one or more runs as Markdown, in ascending order of samples.

    Args:
        language: "en" or "ja".
        has_figures: show those in `figures` beside it; None does for one run, whose folder has them.

    Raises:
        UserError: no runs, or an unknown language.
    """
    if not runs or language not in LANGUAGES:
        raise UserError(f"A report needs a run, and a language of {', '.join(LANGUAGES)}; not {language!r}.")
    texts = JAPANESE if language == "ja" else {}

    def t(text: str, **values: Any) -> str:
        found = texts.get(text, text)
        return found.format(**values) if values else found

    has_figures = len(runs) == 1 if has_figures is None else has_figures
    parts = [part for part in _parts(tables.named(runs), t) if has_figures or not part.startswith("![")]
    return "\n\n".join(parts) + "\n"


def _parts(runs: Mapping[str, Run], t: Translate) -> Iterator[str]:
    """Yield headings, tables, sentences and figures of the report in their order."""
    shown, results = tables.with_original(runs), tables.comparison_table([*runs.values()])
    yield f"# {t('Context-KV attention: experiment report')} ({', '.join(map(literal, runs))})"
    yield f"{t(ORIGINAL)} {t(COMPARABLE if len(shown) > len(runs) else NOT_COMPARABLE)}"
    if len(runs) > 1 and "change" not in results:
        yield t("The runs were validated on different texts: their perplexities cannot be compared.")
    yield f"## {t('Settings')}"
    yield markdown(tables.side_by_side(shown, tables.SETTINGS), t)
    yield f"## {t('Phase 1: OACD (Origin-Anchored Centroid Dispersion)')}"
    yield markdown(tables.side_by_side(shown, tables.PHASE1), t)
    yield f"![{t('Converged positions and loss of Phase 1 by iteration')}](figures/phase1.png)"
    yield f"## {t('Phase 2: epochs')}"
    for name, summary in shown.items():
        yield f"### {literal(t(name))}"
        yield markdown(tables.epochs_table(summary), t)
    yield f"![{t('Train and validation perplexity by epoch')}](figures/ppl_curves.png)"
    yield f"## {t('Results')}"
    yield markdown(results, t)
    yield "\n".join(f"- {sentence}" for sentence in _sentences(runs, results, t))
    yield f"## {t('Memory by stage (GiB)')}"
    yield t("Held at the end of each stage; in brackets the most during it.")
    yield markdown(tables.memory_table(shown), t)
    yield f"![{t('Memory by stage')}](figures/memory.png)"
    yield f"## {t('Cache sizes (MiB)')}"
    yield t("The original keeps an fp32 row of a context and of an embedding for each token.")
    sizes = {f"{name}: held": each["caches_mib"] for name, each in shown.items()}
    sizes |= {f"{name}: in fp32 rows": run.summary["caches_dense_fp32_mib"] for name, run in runs.items()}
    yield markdown(tables.side_by_side(sizes, tables.CACHES).rename_axis(columns="Cache"), t)
    yield f"## {t('Next experiments, as the original proposes them')}"
    yield "\n".join(f"{number}. {t(text)}" for number, text in enumerate(PROPOSALS, start=1))


def _sentences(runs: Mapping[str, Run], results: pd.DataFrame, t: Translate) -> Iterator[str]:
    """Yield what the results say: change, stop, overfitting, error of the test."""
    if "change" in results:
        first, *_, final = runs
        times = runs[final].summary["train_tokens"] / runs[first].summary["train_tokens"]
        changed = {"ppl": results["change"]["Val PPL"], "acc": results["change"]["Val Acc"].split()[0]}
        yield t(CHANGED, first=literal(first), last=literal(final), times=f"{times:,.1f}", **changed)
    for name, run in runs.items():
        phase2, last = run.summary["phase2"], run.summary["phase2"]["epochs"][-1]
        about = {"name": literal(name), "best": phase2["best_epoch"], "last": last["epoch"]}
        yield t(ENDED, **about, reason=t(phase2["stop_reason"]))
        moved = {key: f"{phase2[f'{key}_ppl']:,.1f} → {last[f'{key}_ppl']:,.1f}" for key in ("train", "val")}
        yield t(OVERFITTING, **about, **moved, judgement=t(overfitting(phase2)))
        tested = tables.value_at(run.summary, "test.conversations") or []
        if len(tested) > 1:
            yield t(TEST_ERROR, **about, error=f"{standard_error(tested):.1%}", count=len(tested))


def overfitting(phase2: tables.Summary) -> str:
    """Judge if train PPL as shown fell after the best epoch while val PPL rose."""
    last = phase2["epochs"][-1]
    if phase2["best_epoch"] == last["epoch"]:
        return "no overfitting yet"
    train, val = (round(last[key], 1) - round(phase2[key], 1) for key in ("train_ppl", "val_ppl"))
    return "overfitting" if train < 0 < val else "no clear overfitting"


def standard_error(conversations: Sequence[tuple[int, float]]) -> float:
    """Compute the relative standard error of a PPL over conversations, each (tokens, mean loss in nats)."""
    total, count = sum(tokens for tokens, _ in conversations), len(conversations)
    mean = sum(tokens * loss for tokens, loss in conversations) / total
    squares = sum((tokens * (loss - mean)) ** 2 for tokens, loss in conversations)
    return math.sqrt(squares * count / (count - 1)) / total


def markdown(table: pd.DataFrame, t: Translate = str) -> str:
    """Format a table of text as Markdown, names to the left and the rest to the right, translated by `t`."""

    def cell(text: str) -> str:
        return literal(found if (found := t(text)) != text else " ".join(map(t, text.split(" "))))

    heads = [literal(": ".join(map(t, name.split(": ")))) for name in table.columns]
    rows = [[t(table.columns.name or "Metric"), *heads], ["---", *["---:"] * len(heads)]]
    rows += [[literal(t(str(name))), *map(cell, cells)] for name, *cells in table.itertuples(name=None)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def literal(text: str) -> str:
    """Escape text from outside, so that Markdown shows it as it is."""
    return re.sub(r"([\\`*\[\]|$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
