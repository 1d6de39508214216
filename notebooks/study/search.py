"""The search of protocol `fair`: the same grid for every row, one axis after the other, on validation.

    python notebooks/study/search.py GRU contexts

searches for the rows that are named, or for all but `exact`, whose settings are the original's. A search that
was stopped goes on. What it chose belongs in `fair.json`.
"""

import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

from ctxkv_lib.research.protocol import grid_points, read_protocol

import ctxkv_lib as ctxkv
from ctxkv_lib.files import read_json, write_rows_json
from ctxkv_lib.runs.config import ExperimentConfig
from ctxkv_lib.runs.run_folder import run_folder_of

HERE = Path(__file__).parent
RUNS = Path("runs/study")
RESULTS = HERE / "results/fair/search.json"
AXES = {
    "phase2.learning_rate": (0.00025, 0.0005, 0.001),
    "phase2.max_epochs": (4, 8),
    "phase2.weight_decay": (1.0, 2.0, 4.0),
    "layer_dropout": (0.1, 0.2),  # of the row's plug-in, if it has any
}
START = dict(zip(AXES, (0.0005, 4, 2.0, 0.1), strict=True))  # those of `tuned`
SAMPLES, SEED = 50, 42

Settings = dict[str, float]


def found() -> list[dict[str, Any]]:
    """Read the runs of the search: of each its row, settings, validation perplexity and best epoch."""
    if not RESULTS.is_file():
        return []
    axes, runs = read_json(RESULTS).values()
    return [{**run, "settings": dict(zip(axes, run["settings"], strict=True))} for run in runs]


def next_settings(tried: list[tuple[Settings, float]]) -> tuple[Settings, bool]:
    """Return the next settings to try, and whether any are left; if none are, those that the search chose.

    Args:
        tried: settings with their validation perplexity.
    """
    losses = {tuple(settings.values()): loss for settings, loss in tried}
    best = START
    for axis, values in AXES.items():
        line = [{**best, axis: value} for value in values]
        for settings in line:
            if tuple(settings.values()) not in losses:
                return settings, True
        best = min(line, key=lambda settings: losses[tuple(settings.values())])
    return best, False


def configured(row: str, settings: Settings) -> ExperimentConfig:
    """Configure a run of the search; nothing in it reads the test split."""
    protocol = {**read_protocol(HERE / "fair.json"), "samples": [SAMPLES], "seeds": [SEED]}
    base = protocol["variants"][row]["settings"]
    plugin = "mixer" if "mixer" in base else "attention"
    own = {f"{plugin}.{key}" if key == "layer_dropout" else key: value for key, value in settings.items()}
    variant = {"settings": {**base, **own, "data.test_samples": 0}}
    (point,) = grid_points({**protocol, "variants": {row: variant}}, lambda _: None)
    return point.config


def main(rows: list[str]) -> None:
    """Search for rows of the protocol."""
    variants = read_protocol(HERE / "fair.json")["variants"]
    for row in rows or [name for name, variant in variants.items() if "recipe" not in variant]:
        while True:
            tried = [(run["settings"], run["val_ppl"]) for run in found() if run["row"] == row]
            settings, left = next_settings(tried)
            if not left:
                break
            config = configured(row, settings)
            phase2 = ctxkv.run(config, run_folder_of(config, RUNS)).summary["phase2"]
            result = {"val_ppl": round(phase2["val_ppl"], 3), "best_epoch": phase2["best_epoch"]}
            runs = sorted([*found(), {"row": row, "settings": settings, **result}], key=itemgetter("row"))
            shortened = [{**run, "settings": [*run["settings"].values()]} for run in runs]
            write_rows_json(RESULTS, {"axes": [*AXES], "runs": shortened})
            print(row, settings, result, flush=True)
        print(f"{row}: chosen {settings}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
