"""Tables of runs as DataFrames of text, for notebooks, reports and the terminal.

Each row is defined by its name and by the path of its value in `summary.json`. A missing value is shown as a
dash.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from ..errors import UserError
from ..plugins.plugins import KINDS
from ..runs.config import GROUPS, differing_settings
from ..runs.published import PUBLISHED, published_samples
from ..runs.summary import Run

Summary = Mapping[str, Any]
# Maps the name of each row to the path of its value in a summary, and to the format of the value.
Rows = Mapping[str, tuple[str, str]]

DASH = "–"
# Up to this number of runs, tables have one column per run. With more runs, each run gets a row.
FEW_RUNS = 3
PPL, SHARE, RATIO, COUNT = ",.1f", ".1%", ",.2f", ","
SETTINGS: Rows = {
    "Date": ("provenance.date", ""),
    "Device": ("provenance.device", ""),
    "torch": ("provenance.versions.torch", ""),
    "Commit": ("provenance.git_commit", ""),
    "Preset": ("config.preset", ""),
    "Recipe": ("config.recipe", ""),
    **{kind.capitalize(): (f"config.{kind}.plugin", "") for kind in KINDS},
    "Random seed": ("provenance.seed", ""),
    "Data": ("provenance.data.source", ""),
    "Token table": ("provenance.embeddings.table", ""),
    "Samples": ("samples", COUNT),
    "Train tokens": ("train_tokens", COUNT),
    "Val tokens": ("val_tokens", COUNT),
    "Context dim": ("config.model.context_dim", COUNT),
    "Contexts read (tokens back)": ("context_window.offsets", ""),
    "KV method": ("config.model.kv_method", ""),
    "Contexts in the caches": ("config.phase1.context_method", ""),
    "Contexts without a limit": ("context_window.theoretical_max", COUNT),
    "Heads": ("config.model.num_heads", COUNT),
    "Total parameters": ("parameters.total", COUNT),
    "Trainable in Phase 1": ("parameters.trainable_phase1", COUNT),
    "Trainable in Phase 2": ("parameters.trainable_phase2", COUNT),
    "Matrix products of Phase 2": ("provenance.precision", ""),
}
PHASE1: Rows = {
    "Iterations": ("phase1.iterations", COUNT),
    "Time (s)": ("phase1.seconds", PPL),
    "Converged positions": ("phase1.convergence_rate", ".0%"),
    "Stopped": ("phase1.stop_reason", ""),
    "Effective rank": ("phase1.effective_rank", SHARE),
}
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
}
EPOCHS: Rows = {
    "Train PPL": ("train_ppl", PPL),
    "Val PPL": ("val_ppl", PPL),
    "Val Acc": ("val_acc", SHARE),
    "Val/Train Ratio": ("ratio", RATIO),
    "Note": ("note", ""),
}
CACHE_FILES = ("train_ctx", "train_emb", "val_ctx", "val_emb", "total")
CACHES: Rows = {
    **{name: (f"caches_mib.{name}", PPL) for name in CACHE_FILES},
    **{
        f"{name} in the original's layout (MiB)": (f"caches_dense_fp32_mib.{name}", PPL)
        for name in CACHE_FILES
    },
}
SCORES: Rows = {
    "Conversations": ("conversations", COUNT),
    "Tokens": ("tokens", COUNT),
    "PPL per token": ("ppl", PPL),
    "PPL per word": ("word_ppl", PPL),
    "Bits per byte": ("bits_per_byte", ",.3f"),
    "Accuracy": ("accuracy", SHARE),
}


# Columns of `results` that a terminal shows. `ctxkv list --json` and `--csv` print all columns.
LISTED = {"state": "", "val_ppl": PPL, "test_ppl": PPL, "best_epoch": ""}
LISTED |= dict.fromkeys(("phase1_parameters", "parameters", "mib"), ",.0f")
TERMINAL_WIDTH, SHORTEST_COLUMN = 120, 20  # characters


def format_value(summary: Summary, path: str, spec: str = "") -> str:
    """Format the value at a path such as `phase2.val_ppl`. None becomes a dash. Long lists are shortened."""
    value: Any = summary
    for key in path.split("."):
        value = (value or {}).get(key)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value if len(value) < 5 else [*value[:3], "…", value[-1]]))
    return DASH if value is None else format(value, spec)


def side_by_side(summaries: Mapping[Any, Summary], rows: Rows) -> pd.DataFrame:
    """Make a table of text with one column per summary, leaving out rows without any value."""
    columns = {
        name: [format_value(summary, *where) for where in rows.values()]
        for name, summary in summaries.items()
    }
    table = pd.DataFrame(columns, index=[*rows])
    return table[(table != DASH).any(axis=1)]


def labeled(runs: Sequence[Run] | Mapping[str, Run]) -> dict[str, Run]:
    """Return runs by label. If the caller gives no labels, the labels are the names of folders."""
    if isinstance(runs, Mapping):
        return dict(runs)
    names = [run.path.name for run in runs]
    return {
        name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, runs, strict=True)
    }


def with_original(runs: Mapping[str, Run]) -> dict[str, Summary]:
    """Return the summary and `config` of each run by name.

    A run that repeats an experiment of the original is followed by the original's summary.
    """
    summaries: dict[str, Summary] = {}
    for name, run in runs.items():
        summaries[name] = ours = {**run.summary, "config": run.config.to_dict()}
        if ours["context_window"]["offsets"] is None:  # the layer does not read contexts
            ours |= {"context_window": {}, "config": ours["config"] | {"model": {}, "phase1": {}}}
        if samples := published_samples(run.config):
            same = {key: ours[key] for key in ("config", "context_window")}
            summaries[f"the original, {samples} samples"] = PUBLISHED[samples] | same
    return summaries


def comparison_table(runs: Sequence[Run] | Mapping[str, Run] | Mapping[str, Summary]) -> pd.DataFrame:
    """Make a table of text that compares the results of runs. The function `results` returns numbers.

    Args:
        runs: runs, runs by label, or summaries by label. Each run that repeats the original is followed by
            the original's numbers.

    Returns:
        one column of text per run. The column `change` compares the last run with the first run. It is left
        out if the runs were validated on different texts, or if there are more than three runs and they
        differ in more than the number of samples.
    """
    if not runs:
        raise UserError("runs is empty; give at least one finished run.")
    ends_are_related = len(runs) <= FEW_RUNS
    if isinstance(runs, Mapping) and not all(isinstance(run, Run) for run in runs.values()):
        summaries: Mapping[str, Any] = runs
        ours, table = [*summaries.values()], side_by_side(summaries, RESULTS)
    else:
        by_label: dict[str, Any] = labeled(runs)  # type: ignore[arg-type]
        ours = [run.summary for run in by_label.values()]
        table = side_by_side(with_original(by_label), RESULTS)
        differing = differing_settings([run.config for run in by_label.values()])
        ends_are_related |= differing[0].keys() == {"data.samples"}
    if len(ours) > 1 and ends_are_related and have_one_text(ours):
        gain, ratios = gains(ours[0], ours[-1]), [summary["phase2"]["train_val_ratio"] for summary in ours]
        change = {  # `z` formats -0.0 as 0.0
            "Val PPL": f"{-gain['val_ppl_percent']:+z,.1f}%",
            "Val Acc": f"{gain['val_acc_points']:+z.1f} points",
            "Val/Train Ratio": f"{ratios[-1] / ratios[0] - 1:+z,.1%}",
        }
        table["change"] = pd.Series(change)
    return table.fillna("")


def have_one_text(summaries: Iterable[Summary]) -> bool:
    """Return whether runs were validated on the same text, so that their perplexities can be compared."""
    return (
        len({format_value(summary, "provenance.data.validation_fingerprint") for summary in summaries}) == 1
    )


def gains(first: Summary, last: Summary) -> dict[str, float]:
    """Compute the fall in PPL (%) and the rise in accuracy (points) from the first run to the last run."""
    before, after = first["phase2"], last["phase2"]
    return {
        "val_ppl_percent": 100 * (1 - after["val_ppl"] / before["val_ppl"]),
        "val_acc_points": 100 * (after["val_acc"] - before["val_acc"]),
    }


def epochs_table(summary: Summary) -> pd.DataFrame:
    """List the epochs of a run. The column "Note" says whether an epoch is the best, improved, or worse."""
    lines, best = {}, summary["phase2"]["best_epoch"]
    for line in summary["phase2"]["epochs"]:
        note = "best" if line["epoch"] == best else "improved" if line["improved"] else "worse"
        ratio = line["val_ppl"] and line["val_ppl"] / line["train_ppl"]  # None if not published
        lines[line["epoch"]] = {**line, "ratio": ratio, "note": note}
    return side_by_side(lines, EPOCHS).T.rename_axis(columns="Epoch")


def memory_table(summaries: Mapping[str, Summary]) -> pd.DataFrame:
    """List memory by stage in GiB: the value at the end of the stage, and the stage's peak in brackets."""
    columns: dict[str, dict[str, str]] = {}
    for name, summary in summaries.items():
        for line in memory_stages(summary["memory"]):
            for device in ("cpu", "gpu"):
                if line[f"{device}_gib"] is not None:
                    end, peak = (format_value(line, f"{device}_{kind}", PPL) for kind in ("gib", "peak_gib"))
                    columns.setdefault(f"{name}: {device.upper()}", {})[line["stage"]] = f"{end} ({peak})"
    return pd.DataFrame(columns).fillna(DASH).rename_axis(columns="Stage")


def memory_stages(memory: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the memory of a run by stage, with only the first and the last epoch of Phase 2."""
    epochs = [line for line in memory if line["stage"].startswith("epoch ")]
    stages = [line for line in memory if line not in epochs]
    if epochs:
        stages += [{**epochs[0], "stage": "first epoch"}, {**epochs[-1], "stage": "last epoch"}]
    return stages


def format_results(table: pd.DataFrame) -> str:
    """Format the table of `results` for a terminal of 120 columns, with notes below the table.

    A column in `LISTED` is shown if any run has a value in it. The last column names the settings that
    differ.
    """
    if not len(table):
        return "There are no runs in this folder."
    listed = {name: spec for name, spec in LISTED.items() if name in table and table[name].notna().any()}
    cells = {name: [cell(value, spec) for value in table[name]] for name, spec in listed.items()}
    head, *rows = pd.DataFrame(cells, index=table.index).to_string().split("\n")
    width = max(SHORTEST_COLUMN, TERMINAL_WIDTH - len(head) - 2)
    lines = [f"{head}  settings that differ"]
    for row, (_, values) in zip(rows, table.iterrows(), strict=True):
        first, *more = textwrap.wrap(_settings_in_words(values), width) or [""]
        lines += [f"{row}  {first}".rstrip(), *(" " * (len(head) + 2) + line for line in more)]
    return "\n".join([*lines, *(table["note"].dropna() if "note" in table else ())])


def _settings_in_words(values: "pd.Series[Any]") -> str:
    """Describe the settings in a row of `results`, such as "samples 50, block GatedBlock"."""
    words = []
    for key, value in values.items():
        group, _, name = str(key).rpartition(".")
        is_known = value is not None and value == value  # not NaN
        if is_known and (group in GROUPS or group in KINDS or name in ("preset", "recipe")):
            is_part = name == "plugin"
            shown = str(value).rpartition(":")[2] if is_part else cell(value, "")
            words.append(f"{group if is_part else name} {shown}")
    return ", ".join(words)


def cell(value: Any, spec: str) -> str:
    """Format a value of a DataFrame; an unknown value becomes a dash."""
    if value is None or value != value:  # NaN means unknown
        return DASH
    is_whole = isinstance(value, float) and value.is_integer() and not spec
    return format(int(value) if is_whole else value, spec)


def format_scores(scores: Mapping[str, Any]) -> str:
    """Format the result of `evaluate_texts` for a terminal."""
    parts = [side_by_side({"": scores}, SCORES).to_string(header=False)]
    titles = {"by_position": "Preceding tokens", "by_history": "Contexts in the window"}
    for key in [key for key in titles if key in scores]:
        bins = {f"{line['from']:,} to {format_value(line, 'to', COUNT)}": line for line in scores[key]}
        table = side_by_side(bins, SCORES).T.rename_axis(columns=titles[key])
        parts.append(table.rename(lambda name: name.replace(DASH, "more")).to_string())
    return "\n\n".join(parts)
