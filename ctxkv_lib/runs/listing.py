"""The table of runs and their results that `ctxkv list` prints."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import DamagedFile, UserError
from ..files import MIB, expanded, runs_root
from ..method.callback import epochs_of
from ..store import Record, store
from .config import ExperimentConfig, differing_settings
from .steps import METRICS, SETTINGS, STEPS, config_of, finished, repair
from .summary import Run, summarize

PHASE2 = ("val_ppl", "val_acc", "train_ppl", "best_epoch")


def results(runs: Sequence[Run | Path | str] | Path | str | None = None) -> pd.DataFrame:
    """Collect runs and their results in a table with one row per run.

    Args:
        runs: runs or their folders. If this is a single folder, every run at or below it is listed, even if
            it is damaged; interrupted runs come last. The default is the folder `$CTXKV_RUNS`, or `runs`.

    Returns:
        a table with each run's path as index. Its columns are `state` (finished, interrupted or damaged), the
        settings that are not the same in all runs, `train_tokens`, `val_ppl`, `test_ppl`, `val_acc`,
        `train_ppl`, `best_epoch`, `epochs`, `seconds` (training time of both phases), `phase1_parameters` and
        `parameters` (numbers of parameters that Phase 1 and Phase 2 train), `NAME.val_ppl` and
        `NAME.test_ppl` for each n-gram baseline that was measured, `mib` (size on disk), and `note` (what to
        do if the run is damaged). A run is damaged if a file is missing or has the wrong size. The results of
        an interrupted run come from its best epoch so far. Unknown values are NaN.

    Raises:
        UserError: The folder `runs` does not exist.
    """
    is_folder = runs is None or isinstance(runs, Path | str)
    if runs is None or isinstance(runs, Path | str):
        paths = _run_folders(runs_root() if runs is None else expanded(runs))
    else:
        paths = [run.path if isinstance(run, Run) else expanded(run) for run in runs]
    rows: dict[Path, dict[str, Any]] = {}
    configs: dict[Path, ExperimentConfig] = {}
    for path in paths:
        row: dict[str, Any] = {"state": "damaged"}
        try:
            configs[path] = config_of(path)
            row |= _state_and_results(path, configs[path])
        except DamagedFile as error:
            row["note"] = f"{error.path} is damaged; {repair(path, SETTINGS)}"
        except (UserError, OSError) as error:  # missing or incompatible records
            row["note"] = str(error)
        row["mib"] = folder_bytes(path) / MIB
        rows[path] = row
    if is_folder:
        rows = dict(sorted(rows.items(), key=lambda item: item[1]["state"] == "interrupted"))
    settings = differing_settings([*configs.values()])
    for path, differing in zip(configs, settings, strict=True):
        row = rows[path]
        rows[path] = {"state": row.pop("state"), **differing, **row}
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    last = [column for column in ("mib", "note") if column in columns]
    table = pd.DataFrame.from_dict({str(path): row for path, row in rows.items()}, orient="index")
    return table.reindex(columns=[*(column for column in columns if column not in last), *last])


def describe_store() -> str:
    """Say where the store is and how large it is. Return "" if there is none."""
    folder = store()
    if not folder.is_dir():
        return ""
    return f"The store {folder} has {folder_bytes(folder) / MIB:,.0f} MiB; you may delete it at any time."


def folder_bytes(folder: Path) -> int:
    """Return the size in bytes of all files in a folder, without those that disappear meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _run_folders(root: Path) -> list[Path]:
    """Find all run folders at or below `root`, even if their records are lost. Skip hidden folders."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; choose the folder that contains your run folders.")
    depths = ("", "[!.]*/", "[!.]*/[!.]*/")  # comparisons may contain run folders
    return sorted({file.parent for depth in depths for file in root.glob(f"{depth}{STEPS}")})


def _state_and_results(path: Path, config: ExperimentConfig) -> dict[str, Any]:
    """Return the state and the results of a run. Unfinished runs have those of the best epoch so far."""
    records = finished(path)
    if SETTINGS not in records:
        raise DamagedFile(path / STEPS / f"{SETTINGS}.json", "it is missing or its checksum differs")
    notes = {name: record.damage(path, only_size=True) for name, record in records.items()}
    damaged = next((name for name, words in notes.items() if words), "")
    state: dict[str, Any] = {"state": "finished" if {"phase2", "test"} <= {*records} else "interrupted"}
    if damaged:
        state = {"state": "damaged", "note": f"{notes[damaged]}; {repair(path, damaged)}"}
    if "phase2" in records and "test" in records:
        return state | _results(config, records)
    lines = _lines(path / METRICS)
    best = min(lines, key=lambda line: line["val_ppl"], default={})
    names = {"val_ppl", "val_acc", "train_ppl"} & best.keys()
    epoch = {"best_epoch": best["epoch"], "epochs": lines[-1]["epoch"]} if best else {}
    return {**state, **{name: best[name] for name in PHASE2 if name in names}, **epoch}


def _results(config: ExperimentConfig, records: Mapping[str, Record]) -> dict[str, Any]:
    """Return the results of a finished run."""
    summary = summarize(config, records)
    phase2, epochs = summary["phase2"], summary["phase2"]["epochs"]
    ngrams = {
        f"{name}.{split}_ppl": row[f"{split}_ppl"]
        for name, row in summary.get("ngrams", {}).items()
        for split in ("val", "test")
        if f"{split}_ppl" in row
    }
    return {
        "train_tokens": summary["train_tokens"],
        "val_ppl": phase2["val_ppl"],
        "test_ppl": summary.get("test", {}).get("ppl"),
        **{name: phase2[name] for name in PHASE2[1:]},
        "epochs": len(epochs),
        "seconds": summary["phase1"]["seconds"] + sum(epoch["seconds"] for epoch in epochs),
        "phase1_parameters": summary["parameters"]["trainable_phase1"],
        "parameters": summary["parameters"]["trainable_phase2"],
        **ngrams,
    }


def _lines(metrics: Path) -> list[dict[str, Any]]:
    """Read the metrics of all epochs from `metrics.jsonl`. Skip a line that is only partly written."""
    lines = []
    for text in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return epochs_of(lines)
