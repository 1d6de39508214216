"""The written report of one or more runs, as Markdown in English or Japanese.

Every claim is computed from the runs. `ja.json` contains the Japanese translations. Text without a
translation stays in English.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from ..errors import UserError
from ..method.config import GPT2_VOCAB_SIZE
from ..plugins.hooks import OF_PACKAGE
from ..runs.names import FEW_RUNS
from ..runs.summary import Run
from . import tables
from .difference import standard_error

Translate = Callable[[str], str]

LANGUAGES = ("en", "ja")
JAPANESE: dict[str, str] = json.loads(Path(__file__).with_name("ja.json").read_text(encoding="utf-8"))
ORIGINAL = (
    "The original is the report *Context-KV Attention, 500 samples* of 2025-12-03 from the repository "
    "[rato-tokyo/new-llm](https://github.com/rato-tokyo/new-llm). Its numbers, measured on an NVIDIA L4, are "
    "shown next to each run with the same data, model and settings; a dash means that a number was not "
    "published. Other runs cannot be compared with the original."
)
CHANGED = (
    "From {first} to {last}, the number of training tokens grew by a factor of {times}, val PPL changed by "
    "{ppl}, and val acc changed by {acc}."
)
ENDED = "{name}: val PPL was lowest at epoch {best}; training ended at epoch {last} ({reason})."
OVERFITTING = (
    "{name}: after the best epoch, train PPL changed {train} and val PPL changed {val}, which shows "
    "{judgement}."
)
UNIFORM = (
    "{name}: val PPL {ppl} is worse than guessing uniformly, which has PPL {count} (the vocabulary's size)."
)
TEST_ERROR = "{name}: the test PPL has a standard error of ±{error} over {count} test conversations."
PROPOSALS = (
    "Longer interval: 50 or 100 instead of 20 (`--set model.interval=50`).",
    "More data: 1,000 or 2,000 samples instead of 500 (`--samples 1000`).",
    "Stronger regularisation: more dropout and weight decay (`--set model.attention_dropout=0.2`).",
    "More contexts: 64 instead of 32 (`--set model.max_contexts=64`).",
)
FIGURES = {
    "phase1": "Converged positions and loss of Phase 1 by iteration",
    "ppl_curves": "Train and validation perplexity by epoch",
    "memory": "Memory by stage",
}


def write_report(runs: Sequence[Run], language: str = "en", has_figures: bool = False) -> str:
    """Write the report of one or more runs as Markdown. The runs are sorted by their number of samples.

    With more than three runs, tables have one row per run, and only the run with the lowest validation
    perplexity gets a table of its epochs.

    Args:
        language: "en" or "ja".
        has_figures: whether the report shows the pictures in the folder `figures` next to the report. The
            report of a single run always shows these pictures.

    Raises:
        UserError: there are no runs, or the language is unknown.
    """
    if not runs or language not in LANGUAGES:
        raise UserError(
            f"A report needs at least one run, and a language that is {' or '.join(LANGUAGES)}; language is "
            f"{language!r}."
        )
    texts = JAPANESE if language == "ja" else {}

    def t(text: str) -> str:
        # A text without a translation, such as "+4.5 points", is translated word by word.
        return texts.get(text) or " ".join(texts.get(word, word) for word in text.split(" "))

    plugins = [plugin for run in runs for plugin in run.config.plugins.values()]
    has_own_parts = not all(plugin.name.startswith(OF_PACKAGE) for plugin in plugins)
    caches, cache_rows = "Caches in MiB (the original's layout: fp32 rows)", tables.CACHES
    # If the user has replaced a part of the method, the original's caches and the experiments that it
    # proposes do not apply.
    if has_own_parts:
        caches, cache_rows = "Caches in MiB", {name: tables.CACHES[name] for name in tables.CACHE_FILES}
    ours, results = tables.runs_by_name(runs), tables.comparison_table(runs)
    columns = {t(name): summary for name, summary in tables.with_original(ours).items()}
    sections = {
        "Settings": tables.side_by_side(columns, tables.SETTINGS),
        "Phase 1: OACD (Origin-Anchored Centroid Dispersion)": tables.side_by_side(columns, tables.PHASE1),
        **{f"{t('Phase 2')}: {name}": tables.epochs_table(summary) for name, summary in columns.items()},
        "Results": results,
        "Memory in GiB at the end of each stage (in brackets: the peak)": tables.memory_table(columns),
        caches: tables.side_by_side(columns, cache_rows),
    }
    title, described = ", ".join(ours), ours
    if len(runs) > FEW_RUNS:
        best = min(ours, key=lambda name: ours[name].summary["phase2"]["val_ppl"])
        title, described = t(f"{len(runs)} runs"), {best: ours[best]}
        sections = _a_row_a_run(sections, [t(name) for name in ours], t(best), t)
    parts = [f"# {t('Context-KV attention: experiment report')} ({title})", t(ORIGINAL)]
    for heading, table in sections.items():
        parts += [f"## {t(heading)}", markdown(table, t)]
        if heading == "Results":
            sentences = (*_comparison(ours, results, t), *_trainings(described, t))
            parts.append("\n".join(f"- {sentence}" for sentence in sentences))
    if has_figures or len(runs) == 1:
        trained = any(run.phase1 for run in runs)
        shown = {name: text for name, text in FIGURES.items() if trained or name != "phase1"}
        parts += [f"![{t(text)}](figures/{name}.png)" for name, text in shown.items()]
    if not has_own_parts:
        parts.append(f"## {t('Next experiments that the original proposes')}")
        parts.append("\n".join(f"{number}. {t(text)}" for number, text in enumerate(PROPOSALS, start=1)))
    return "\n\n".join(parts) + "\n"


def _a_row_a_run(
    sections: Mapping[str, pd.DataFrame], ours: list[str], best: str, t: Translate
) -> dict[str, pd.DataFrame]:
    """Rearrange the sections for many runs: one row per run, and the epochs of the best run only."""
    settings, epochs = sections["Settings"][ours], f"{t('Phase 2')}: "
    differ = settings.nunique(axis=1) > 1
    shared = settings[~differ].iloc[:, :1].set_axis(["all runs"], axis=1)
    by_run = {
        heading: table if heading.startswith(epochs) else table.T.rename_axis(columns="Run")
        for heading, table in sections.items()
        if not heading.startswith(epochs) or heading == epochs + best
    }
    differing = by_run.pop("Settings").loc[ours, differ]
    return {
        "Settings that all runs share": shared,
        **({"Settings that differ": differing} if differ.any() else {}),
        **by_run,
    }


def _comparison(runs: Mapping[str, Run], results: pd.DataFrame, t: Translate) -> Iterator[str]:
    """Yield sentences that compare the runs."""
    first, *_, last = [*runs] * 2
    if "change" in results:
        times = runs[last].summary["train_tokens"] / runs[first].summary["train_tokens"]
        ppl, acc = (t(results["change"][row]) for row in ("Val PPL", "Val Acc"))
        yield t(CHANGED).format(first=first, last=last, times=f"{times:,.1f}", ppl=ppl, acc=acc)
    elif not tables.have_one_text(run.summary for run in runs.values()):
        yield t("The runs were validated on different texts: their perplexities cannot be compared.")


def _trainings(runs: Mapping[str, Run], t: Translate) -> Iterator[str]:
    """Yield sentences on each run: how training ended, whether the model overfitted, and the test error."""
    for name, run in runs.items():
        best, end = run.summary["phase2"], run.summary["phase2"]["epochs"][-1]
        overfits = end["train_ppl"] < best["train_ppl"] and end["val_ppl"] > best["val_ppl"]
        reason, judgement = t(best["stop_reason"]), t("overfitting" if overfits else "no clear overfitting")
        yield t(ENDED).format(name=name, best=best["best_epoch"], last=end["epoch"], reason=reason)
        if best["val_ppl"] > GPT2_VOCAB_SIZE:
            shown = {"ppl": f"{best['val_ppl']:,.1f}", "count": f"{GPT2_VOCAB_SIZE:,}"}
            yield t(UNIFORM).format(name=name, **shown)
        elif end["epoch"] > best["best_epoch"]:
            moved = {key: f"{best[f'{key}_ppl']:,.1f} → {end[f'{key}_ppl']:,.1f}" for key in ("train", "val")}
            yield t(OVERFITTING).format(name=name, judgement=judgement, **moved)
        if len(tested := run.summary.get("test", {}).get("conversations", [])) > 1:
            yield t(TEST_ERROR).format(name=name, error=f"{standard_error(tested):.1%}", count=len(tested))


def markdown(table: pd.DataFrame, t: Translate = str) -> str:
    """Format a table of text as Markdown, translated by `t`. Only its first column is left-aligned."""
    rows = [[table.columns.name or "Metric", *table.columns], *table.itertuples(name=None)]
    lines = [" | ".join(t(str(cell)).replace("|", r"\|") for cell in row) for row in rows]
    lines.insert(1, " | ".join(["---", *["---:"] * len(table.columns)]))
    return "\n".join(f"| {line} |" for line in lines)
