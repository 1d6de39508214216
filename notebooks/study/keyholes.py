"""Measure which tokens the 32 slots still hold: `python notebooks/study/keyholes.py` writes the rows.

Runs Phase 1 of recipes `exact` and `tuned`, 50 conversations each, and measures how well a context's own token
and the tokens before it can be decoded from the context. `story.py` draws the rows. Takes 10 minutes on one
core.
"""

import json
from typing import Any

from probe import encoded
from tables import TOP
from train import FIFTY, SEEDS

import ctxkv_lib as ctxkv

ROWS = TOP / "notebooks" / "study" / "results" / "keyholes" / "keyholes.json"


def curve(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the distances of a probe in tokens, with R² and the share of tokens named correctly at each."""
    rows = measured["decodability"]
    return {
        "distance": [row["distance"] for row in rows],
        "r2": [round(row["r2"], 4) for row in rows],
        "named": [round(row["top1"], 4) for row in rows],
    }


def keyholes(recipe: str, seed: int) -> dict[str, Any]:
    """Train the contexts of a recipe and measure what they hold; `untrained` is the block at its start."""
    settings = {**FIFTY, "runtime.seed": seed}
    prepared = ctxkv.prepare(ctxkv.build_config("offline", recipe, 50, settings=settings))
    probed = encoded(prepared.model, prepared.caches)
    return {
        "recipe": recipe,
        "samples": 50,
        "seed": seed,
        "offsets": list(probed["offsets"]),
        "memory_span": probed["memory_span"],
        **curve(probed),
        "untrained": {std: curve(each) for std, each in probed["untrained"].items()},
    }


if __name__ == "__main__":
    runs = [keyholes(recipe, seed) for recipe in ("exact", "tuned") for seed in SEEDS]
    ROWS.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(run) for run in runs)
    ROWS.write_text(f'{{"runs": [\n{lines}\n]}}\n', encoding="utf-8")
