"""The written report of one or more runs, as Markdown in English or Japanese.

Every claim is computed from the runs. `ja.json` has the Japanese of every text; what it lacks stays English.
"""

import html
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from ..errors import UserError
from ..runs.folder import Run
from . import tables
from .tables import COUNT, PPL, SHARE, Rows, Summary

LANGUAGES = ("en", "ja")
MARKUP = frozenset("\\`*[]|$")  # of Markdown; `<`, `>` and `&` become entities
SETTINGS: Rows = {
    "Date": ("provenance.date", ""),
    "Device": ("provenance.device", ""),
    "torch": ("provenance.versions.torch", ""),
    "Commit": ("provenance.git_commit", ""),
    "Preset": ("config.preset", ""),
    "Recipe": ("config.recipe", ""),
    **{f"Own {hook}": (f"config.{hook}.plugin", "") for hook in ("block", "loss", "attention", "mixer")},
    "Random seed": ("provenance.seed", ""),
    "Data": ("provenance.data.source", ""),
    "Token table": ("provenance.embeddings.table", ""),
    "Samples": ("samples", COUNT),
    "Train tokens": ("train_tokens", COUNT),
    "Val tokens": ("val_tokens", COUNT),
    "Context dim": ("config.model.context_dim", COUNT),
    "Contexts read (tokens back)": ("slots", ""),
    "KV method": ("config.model.kv_method", ""),
    "Contexts in the caches": ("config.phase1.context_method", ""),
    "Contexts without a limit": ("context_window.theoretical_max", COUNT),
    "Heads": ("config.model.num_heads", COUNT),
    "Total parameters": ("parameters.total", COUNT),
    "Trainable in Phase 2": ("parameters.trainable_phase2", COUNT),
    "Matrix products of Phase 2": ("provenance.precision", ""),
}
PHASE1: Rows = {
    "Iterations": ("phase1.iterations", COUNT),
    "Time (s)": ("phase1.seconds", PPL),
    "Converged positions": ("phase1.convergence_rate", ".0%"),
    "Stopped": ("phase1.stop_reason", ""),
    "Effective rank": ("phase1.effective_rank", SHARE),
    "Memory span (tokens)": ("probe.memory_span", COUNT),
    "Window within some context's memory span": ("probe.coverage", SHARE),
}
CACHES: Rows = {name: (name, PPL) for name in ("train_ctx", "train_emb", "val_ctx", "val_emb", "total")}
ENDED = {
    "early_stopping": "{name}: val PPL was lowest at epoch {best}; early stopping {patience} epochs later.",
    "max_epochs": "{name}: val PPL was lowest at epoch {best}; training ran to its limit of {limit} epochs.",
}
OVERFITTING = {
    "yes": "{name}: after its best epoch train PPL fell ({train}) while val PPL rose ({val}): overfitting.",
    "unclear": "{name}: no clear overfitting after its best epoch: train PPL {train}, val PPL {val}.",
    "not_yet": "{name}: no overfitting yet: its last epoch is the best.",
}
CHANGED = "From {first} to {last}: {times} times the training tokens, val PPL {ppl}, val acc {acc} points."
TEST_ERROR = "{name}: the test PPL has a standard error of ±{error} over {count} test conversations."
ORIGINAL = (
    "The original: report *Context-KV Attention, 500 samples* of 2025-12-03, repository "
    "[rato-tokyo/new-llm](https://github.com/rato-tokyo/new-llm)."
)
COMPARABLE = "Its columns have the numbers of its runs on an NVIDIA L4; a dash was not published."
NOT_COMPARABLE = "Data, model or training settings differ: its numbers cannot be compared with these."
PROPOSALS = (
    "Longer interval: 20 to 50 or 100 (`--set model.interval=50`).",
    "More data: 500 to 1,000 or 2,000 samples (`--samples 1000`).",
    "Regularisation: more dropout and weight decay (`--set model.attention_dropout=0.2`).",
    "More contexts: 32 to 64 (`--set model.max_contexts=64`).",
)


@cache
def translations() -> dict[str, str]:
    """Read `ja.json`: the Japanese of every English text."""
    return json.loads(files(__package__).joinpath("ja.json").read_text(encoding="utf-8"))


def write_report(runs: Sequence[Run], language: str = "en", has_figures: bool | None = None) -> str:
    """Write the report as Markdown.

    Args:
        runs: one or more; they are compared in ascending order of samples.
        language: "en" or "ja".
        has_figures: show those in `figures` beside it; None does for one run, whose folder has them.

    Raises:
        UserError: no runs, or an unknown language.
    """
    if not runs:
        raise UserError("There are no runs to report; name at least one run folder.")
    if language not in LANGUAGES:
        raise UserError(f"language is {language!r}; allowed: {', '.join(LANGUAGES)}.")
    has_figures = len(runs) == 1 if has_figures is None else has_figures
    return "\n\n".join(_parts(tables.named(runs), language, has_figures)) + "\n"


def _parts(runs: Mapping[str, Run], language: str, has_figures: bool) -> Iterator[str]:
    """Yield headings, tables, sentences and figures of the report in their order."""

    def t(text: str, **values: Any) -> str:
        found = translations().get(text, text) if language == "ja" else text
        return found.format(**values) if values else found

    def bullets(found: Iterable[tuple[str, dict[str, Any]]]) -> str:
        return "\n".join(f"- {t(text, **values)}" for text, values in found)

    def figure(name: str, about: str) -> list[str]:
        return [f"![{t(about)}](figures/{name}.png)"] if has_figures else []

    shown = tables.with_original(runs)
    yield f"# {t('Context-KV attention: experiment report')} ({', '.join(map(literal, runs))})"
    yield f"{t(ORIGINAL)} {t(COMPARABLE if len(shown) > len(runs) else NOT_COMPARABLE)}"
    if not tables.is_one_validation([run.summary for run in runs.values()]):
        yield t("The runs were validated on different texts: their perplexities cannot be compared.")
    yield f"## {t('Settings')}"
    yield markdown(tables.side_by_side(shown, SETTINGS), t)
    yield f"## {t('Phase 1: OACD (Origin-Anchored Centroid Dispersion)')}"
    yield markdown(tables.side_by_side(shown, PHASE1), t)
    yield from figure("phase1", "Converged positions and loss of Phase 1 by iteration")
    yield f"## {t('Phase 2: epochs')}"
    for name, summary in shown.items():
        yield f"### {literal(t(name))}"
        yield markdown(tables.epochs_table(summary), t)
    yield from figure("ppl_curves", "Train and validation perplexity by epoch")
    yield f"## {t('Results')}"
    yield markdown(tables.comparison_table([*runs.values()]), t)
    yield bullets(_sentences(runs))
    yield f"## {t('Memory by stage (GiB)')}"
    yield t("Held at the end of each stage; in brackets the most during it.")
    yield markdown(tables.memory_table(shown), t)
    yield from figure("memory", "Memory by stage")
    yield f"## {t('Cache sizes (MiB)')}"
    yield t("The original keeps an fp32 row of a context and of an embedding for each token.")
    held = {name: {"held": each["caches_mib"]} for name, each in shown.items()}
    for name, run in runs.items():
        held[name]["in fp32 rows"] = run.summary["caches_dense_fp32_mib"]
    sizes = {f"{name}: {how}": each for name, found in held.items() for how, each in found.items()}
    yield markdown(tables.side_by_side(sizes, CACHES).rename_axis(columns="Cache"), t)
    yield f"## {t('Next experiments, as the original proposes them')}"
    yield "\n".join(f"{number}. {t(text)}" for number, text in enumerate(PROPOSALS, start=1))


def _sentences(runs: Mapping[str, Run]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what the results say, as a text and its values: change, stop, overfitting, error of the test."""
    (first, before), *_, (last, after) = [*runs.items(), *runs.items()]
    if len(runs) > 1 and tables.is_one_validation([run.summary for run in runs.values()]):
        gain = tables.gains(before.summary, after.summary)
        times = after.summary["train_tokens"] / before.summary["train_tokens"]
        changed = {"ppl": f"{-gain['val_ppl_percent']:+z,.1f}%", "acc": f"{gain['val_acc_points']:+z.1f}"}
        yield CHANGED, {"first": literal(first), "last": literal(last), "times": f"{times:,.1f}", **changed}
    for name, run in runs.items():
        phase2, epochs = run.summary["phase2"], run.summary["phase2"]["epochs"]
        about = {"name": literal(name), "best": phase2["best_epoch"], "limit": run.config.phase2.max_epochs}
        yield ENDED[phase2["stop_reason"]], {**about, "patience": run.config.phase2.patience}
        moved = {
            key: f"{phase2[f'{key}_ppl']:,.1f} → {epochs[-1][f'{key}_ppl']:,.1f}" for key in ("train", "val")
        }
        yield OVERFITTING[overfitting(phase2)], about | moved
        tested = tables.value_at(run.summary, "test.conversations") or []
        if len(tested) > 1:
            yield TEST_ERROR, {**about, "error": f"{standard_error(tested):.1%}", "count": len(tested)}


def overfitting(phase2: Summary) -> str:
    """Judge if train PPL as shown fell after the best epoch while val PPL rose: yes, unclear or not_yet."""
    last = phase2["epochs"][-1]
    if phase2["best_epoch"] == last["epoch"]:
        return "not_yet"
    train, val = (round(last[name], 1) - round(phase2[name], 1) for name in ("train_ppl", "val_ppl"))
    return "yes" if train < 0 < val else "unclear"


def standard_error(conversations: Sequence[tuple[int, float]]) -> float:
    """Compute the relative standard error of a PPL over conversations, each (tokens, mean loss in nats)."""
    total, count = sum(tokens for tokens, _ in conversations), len(conversations)
    mean = sum(tokens * loss for tokens, loss in conversations) / total
    squares = sum((tokens * (loss - mean)) ** 2 for tokens, loss in conversations)
    return math.sqrt(squares * count / (count - 1)) / total


def markdown(table: pd.DataFrame, t: Callable[[str], str] = str) -> str:
    """Format a table of text as Markdown, names to the left and the rest to the right, translated by `t`."""

    def cell(text: str) -> str:
        return literal(found if (found := t(text)) != text else " ".join(map(t, text.split(" "))))

    heads = [literal(": ".join(map(t, name.split(": ")))) for name in table.columns]
    rows = [[t(table.columns.name or "Metric"), *heads], ["---", *["---:"] * len(heads)]]
    rows += [[literal(t(str(name))), *map(cell, cells)] for name, *cells in table.itertuples(name=None)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def literal(text: str) -> str:
    """Escape text from outside, so that Markdown shows it as it is."""
    marked = "".join(f"\\{c}" if c in MARKUP else c for c in " ".join(text.split()))
    return html.escape(marked, quote=False)
