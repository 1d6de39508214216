"""Tables of runs as DataFrames of text: notebooks show them, the report and the terminal print them.

A row is a name and where its value lies in `summary.json`. What a summary lacks shows as a dash.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..progress import counted
from ..runs.folder import Run
from ..runs.listing import Listed, run_names
from ..runs.published import PUBLISHED, published_samples

Summary = Mapping[str, Any]
Rows = Mapping[str, tuple[str, str]]  # name: path in a summary, format

DASH = "–"
ORIGINAL = "the original, {samples} samples"
PPL, SHARE, RATIO, COUNT = ",.1f", ".1%", ",.2f", ","
LARGEST_SHOWN = 1e9  # perplexity of a word; text with few spaces has words of many tokens
RESULTS: Rows = {
    "Val PPL": ("phase2.val_ppl", PPL),
    "Val Acc": ("phase2.val_acc", SHARE),
    "Train PPL": ("phase2.train_ppl", PPL),
    "Val/Train Ratio": ("phase2.train_val_ratio", RATIO),
    "Best epoch": ("phase2.best_epoch", COUNT),
    "Time per epoch (s)": ("phase2.seconds_per_epoch", PPL),
    "Test PPL": ("test.ppl", PPL),
    "Test Acc": ("test.acc", SHARE),
    "Val PPL of n-grams": ("ngrams.kneser_ney.val_ppl", PPL),
    "Val PPL of n-grams and cache": ("ngrams.kneser_ney_cache.val_ppl", PPL),
    "Val PPL of n-grams (table's text too) and cache": ("ngrams.kneser_ney_table_cache.val_ppl", PPL),
    "Test PPL of n-grams": ("ngrams.kneser_ney.test_ppl", PPL),
    "Test PPL of n-grams and cache": ("ngrams.kneser_ney_cache.test_ppl", PPL),
    "Test PPL of n-grams (table's text too) and cache": ("ngrams.kneser_ney_table_cache.test_ppl", PPL),
    "Val PPL if contexts are zeros (%)": ("probe.changed.zero.percent", "+z,.1f"),
    "Val PPL if contexts are another conversation's (%)": ("probe.changed.elsewhere.percent", "+z,.1f"),
}


def value_at(summary: Summary, path: str) -> Any:
    """Look up a value by its path, such as `phase2.val_ppl`; None if the summary lacks it."""
    value: Any = summary
    for key in path.split("."):
        value = (value or {}).get(key)
    return value


def formatted(value: Any, spec: str) -> str:
    return DASH if value is None else value if isinstance(value, str) else format(value, spec)


def side_by_side(summaries: Mapping[str, Summary], rows: Rows) -> pd.DataFrame:
    """Make a table with a column for each summary; rows without any value are left out."""
    columns = {
        name: {row: formatted(value_at(summary, path), spec) for row, (path, spec) in rows.items()}
        for name, summary in summaries.items()
    }
    table = pd.DataFrame(columns, index=list(rows))
    return table[(table != DASH).any(axis=1)]


def with_original(runs: Mapping[str, Run]) -> dict[str, Summary]:
    """Return summaries by name, each followed by that of the original's run which it repeats, if any.

    Each also has its `config`, and its `slots` as text.
    """
    found: dict[str, Summary] = {}
    for name, run in runs.items():
        offsets = run.summary["context_window"].get("offsets")
        about = {"config": run.config.to_dict(), "slots": offsets and slots_text(offsets)}
        found[name] = {**run.summary, **about}
        if samples := published_samples(run.config):
            found[ORIGINAL.format(samples=samples)] = {**PUBLISHED[samples], **about}
    return found


def slots_text(offsets: Sequence[int]) -> str:
    """Name the distances of slots in tokens: 0, 20, 40, …, 620."""
    shown = [f"{offset:,}" for offset in offsets]
    return ", ".join(shown if len(shown) < 5 else [*shown[:3], "…", shown[-1]])


def comparison_table(runs: Sequence[Run] | Mapping[str, Summary]) -> pd.DataFrame:
    """Compare results, as the original's report does.

    Args:
        runs: or summaries by name. Runs that repeat the original's stand beside its numbers.

    Returns:
        a column of text for each; with several on one validation text, the change of the last from the first.
    """
    ours = runs if isinstance(runs, Mapping) else {n: r.summary for n, r in named(runs).items()}
    table = side_by_side(runs if isinstance(runs, Mapping) else with_original(named(runs)), RESULTS)
    if len(ours) > 1 and is_one_validation([*ours.values()]):
        table["change"] = pd.Series(_changes(*[*ours.values()][:: len(ours) - 1]))
    return table.fillna("")


def named(runs: Sequence[Run]) -> dict[str, Run]:
    """Name runs by what differs, in ascending order of samples."""
    ascending = sorted(runs, key=lambda run: run.summary["samples"])
    return dict(zip(run_names(ascending), ascending, strict=True))


def is_one_validation(summaries: Sequence[Summary]) -> bool:
    """Return whether all have the same validation text; the original's summaries do not name theirs."""
    return len({value_at(each, "provenance.data.validation_fingerprint") for each in summaries}) == 1


def gains(first: Summary, last: Summary) -> dict[str, float]:
    """Compute by how much validation PPL is lower (percent) and accuracy higher (points) in the last run."""
    before, after = first["phase2"], last["phase2"]
    return {
        "val_ppl_percent": 100 * (1 - after["val_ppl"] / before["val_ppl"]),
        "val_acc_points": 100 * (after["val_acc"] - before["val_acc"]),
    }


def _changes(first: Summary, last: Summary) -> dict[str, str]:
    """Return the signed changes; z: what rounds to zero is not negative."""
    before, after, gain = first["phase2"], last["phase2"], gains(first, last)
    return {
        "Val PPL": f"{-gain['val_ppl_percent']:+z,.1f}%",
        "Val Acc": f"{gain['val_acc_points']:+z.1f} points",
        "Val/Train Ratio": f"{after['train_val_ratio'] / before['train_val_ratio'] - 1:+z,.1%}",
        "Best epoch": f"{after['best_epoch'] - before['best_epoch']:+d}",
    }


def epochs_table(summary: Summary) -> pd.DataFrame:
    """List the epochs of a run, or of the original's, and note the best one and where training stopped."""
    phase2 = summary["phase2"]
    rows = {}
    for line in phase2["epochs"]:
        known = line["val_ppl"] is not None
        stopped = line is phase2["epochs"][-1] and phase2["stop_reason"] == "early_stopping"
        note = "improved" if line["improved"] else "worse; early stop" if stopped else "worse"
        rows[line["epoch"]] = {
            "Train PPL": formatted(line["train_ppl"], PPL),
            "Val PPL": formatted(line["val_ppl"], PPL),
            "Val Acc": formatted(line["val_acc"], SHARE),
            "Val/Train Ratio": f"{line['val_ppl'] / line['train_ppl']:,.2f}" if known else DASH,
            "Note": "best" if line["epoch"] == phase2["best_epoch"] else note,
        }
    return pd.DataFrame(rows).T.rename_axis(columns="Epoch")


def memory_table(summaries: Mapping[str, Summary]) -> pd.DataFrame:
    """List memory by stage in GiB: held at its end and, in brackets, the most during it."""
    columns: dict[str, dict[str, str]] = {}
    for name, summary in summaries.items():
        for line in memory_stages(summary["memory"]):
            for device in ("cpu", "gpu"):
                held, peak = line[f"{device}_gib"], line[f"{device}_peak_gib"]
                if held is not None:
                    text = f"{held:,.1f}" + ("" if peak is None else f" ({peak:,.1f})")
                    columns.setdefault(f"{name}: {device.upper()}", {})[line["stage"]] = text
    return pd.DataFrame(columns).fillna(DASH).rename_axis(columns="Stage")


def memory_stages(memory: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the stages of a run, of its epochs only the first and the last."""
    epochs = [line for line in memory if line["stage"].startswith("epoch ")]
    shown = [*({**line, "stage": "first epoch"} for line in epochs[:1])]
    shown += ({**line, "stage": "last epoch"} for line in epochs[1:][-1:])
    return [*(dict(line) for line in memory if line not in epochs), *shown]


def aligned(rows: Mapping[str, str]) -> str:
    """Format names and values as two columns of text."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}   {value}" for name, value in rows.items())


def format_runs(runs: Sequence[Listed]) -> str:
    """Format `list_runs` for a terminal; settings come last, as they can be many."""
    rows = {
        str(run.path): {
            "State": run.state,
            "Preset, recipe": run.kind,
            "Tokens": formatted(run.tokens, COUNT),
            "Best PPL": formatted(run.best_ppl, PPL),
            "MiB": f"{run.mib:,.0f}",
            "Settings that differ": ", ".join(f"{key}={value}" for key, value in run.settings.items()),
        }
        for run in runs
    }
    return pd.DataFrame(rows).T.to_string() if rows else "There are no runs here."


def format_scores(scores: Mapping[str, Any]) -> str:
    """Format the result of `evaluate_texts` for a terminal."""
    word_ppl = scores["word_ppl"]
    a_word = f"{word_ppl:,.1f}" if word_ppl and word_ppl < LARGEST_SHOWN else "over a billion"
    parts = [
        f"{counted(scores['conversations'], ' conversations')}, {scores['tokens']:,} tokens\n"
        f"PPL {scores['ppl']:,.1f} a token, {a_word} a word; "
        f"{scores['bits_per_byte']:.3f} bits a byte; accuracy {scores['accuracy']:.1%}"
    ]
    for key, title in {
        "by_position": "By tokens read before",
        "by_history": "By contexts in the window",
    }.items():
        table = pd.DataFrame(scores[key]).astype({"to": object}).fillna({"to": "more"})
        formats = {"ppl": "{:,.1f}".format, "accuracy": "{:.1%}".format, "tokens": "{:,}".format}
        parts.append(f"{title}\n{table.to_string(index=False, formatters=formats)}")
    return "\n\n".join(parts)
