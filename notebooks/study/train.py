"""Train a part of the study: `python notebooks/study/train.py PART --workers 2`.

`--help` lists the parts. All parts together take days on 2 cores. Finished runs are reused, and
`ctxkv.difference` compares them. README.md lists the rows of the results that are missing here because they
can no longer be trained.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

import ctxkv_lib as ctxkv

# The settings of a variant, including its `recipe` and its plug-ins.
Settings = Mapping[str, Any]

SEEDS = (42, 43, 44)
EPOCH = ("epoch", "train_ppl", "val_ppl", "val_acc")  # what the results keep of each epoch
FIFTY = {"data.validation_samples": 50, "data.test_samples": 50}
EXACT, COPYING, OF_TOKENS = {"recipe": "exact"}, {"recipe": "tuned"}, {"recipe": "tuned"}
BASELINES = "ctxkv_lib.baselines"
ALL_TOKENS = {"layer": f"{BASELINES}:LastTokens", "layer.history": 640}
UNTRAINED = {"phase1.max_iterations": 0}
PROPOSED = {**EXACT, "data.test_samples": 50}
MOVED = {**EXACT, **FIFTY, "block": "plugins:MovedBlock"}
# What could make up for Phase 1, and what could undo its effect.
MEANS: dict[str, Settings] = {
    "exact": {**EXACT, **FIFTY},
    "exact, untrained": {**EXACT, **FIFTY, **UNTRAINED},
    "exact, centered": {**MOVED, **UNTRAINED, "block.removed": 1.0},
    "exact, mean restored": {**MOVED, "block.removed": -1.0},
    "exact, mean doubled": {**MOVED, **UNTRAINED, "block.removed": -1.0},
}
RATES = (0.0005, 0.001, 0.002)  # learning rates of Phase 2; 0.001 is the published one
# Copying is on only in the row `tuned, copying`.
TUNED = {"recipe": "tuned", "layer.copy_weight": 0.0}
OTHER = {**TUNED, "layer": "plugins:OtherSlots"}
PER_HEAD = {**OTHER, "layer.slot_bias": "per_head"}
LEARNED = {**OTHER, "layer.slot_bias": "learned"}
CHUNKED = {**FIFTY, **TUNED, "layer": "plugins:Chunked"}
RANDOM = {
    "block": "ctxkv_lib.method.block:ContextBlock",
    "phase1.learning_rate": 0.002,
    "phase1.noise_std": 0.1,
}
SYMMETRIC = {"data.neighbours": "around", "layer.layer_dropout": 0.2}
TOKENS = {"block": "plugins:TokenBlock", "model.context_dim": 768, "model.intermediate_size": 2560}
LAST = {**TOKENS, "layer.slots": "uniform", "model.interval": 1}
PREDICTIVE = {"block": "plugins:PredictiveBlock", "model.intermediate_size": 2560, **UNTRAINED}
# `search.py` found these settings for the rows `contexts` and `GRU` of part `fair`.
FAST = {"phase2.learning_rate": 0.001, "phase2.max_epochs": 8}
# `search.py` found these settings for the other rows of part `fair`.
DECAYED = {**FAST, "phase2.weight_decay": 4.0}

# For each part: the numbers of training conversations, and the settings of each variant.
PARTS: dict[str, tuple[tuple[int, ...], dict[str, Settings]]] = {
    "answer": ((10, 50, 200), {
        "exact": EXACT,
        "exact, untrained": {**EXACT, **UNTRAINED},
        "tuned": TUNED,
        "tuned, copying": COPYING,
        "tuned, bias per head": PER_HEAD,
        "tuned, bias per head, random init": {**PER_HEAD, **RANDOM},
        "tuned, random init, bias from 0": {**LEARNED, **RANDOM},
        "tuned, random init, bias from 0, symmetric table": {**LEARNED, **RANDOM, **SYMMETRIC},
        "exact, directional table": {**EXACT, "data.neighbours": "sides"},
        "exact, embedding norm 3.9": {**EXACT, "data.row_length": 3.9},
    }),
    "baselines": ((10, 50, 200), {
        "contexts": TUNED,
        "untrained ContextBlock": {**TUNED, **UNTRAINED},
        "untrained ContextBlock, bias per head": {**PER_HEAD, **UNTRAINED},
        "untrained ContextBlock, bias per head, random init": {**PER_HEAD, **RANDOM, **UNTRAINED},
        "no contexts": {**OF_TOKENS, "layer": f"{BASELINES}:CurrentToken"},
        "last 32 tokens": {**OTHER, **LAST},
        "last 32 tokens, bias per head": {**PER_HEAD, **LAST},
        "32 tokens, 20 apart": {**PER_HEAD, **TOKENS, "layer.slots": "uniform"},
        "all 640 tokens": {**OF_TOKENS, **ALL_TOKENS},
        "GRU": {**OF_TOKENS, "layer": f"{BASELINES}:GRU"},
    }),
    "levers": ((50,), {
        "tuned": TUNED,
        "layer dropout 0.2": {**TUNED, "layer.layer_dropout": 0.2},
        "embedding norm 1": {**TUNED, "data.row_length": 1.0},
        "4 heads": {**TUNED, "model.num_heads": 4},
        "no current-token bias": {**TUNED, "layer.current_token_bias": 0.0},
        "without log-frequencies": {**TUNED, "data.unigram": "none"},
        "output residual": {**OTHER, "layer.residual": True},
        "slots 20 apart": {**OTHER, "layer.slots": "uniform"},
        "no slot bias": {**OTHER, "layer.slot_bias": "none"},
        "batch 512, rate 0.001": {**TUNED, "phase2.batch_size": 512, "phase2.learning_rate": 0.001},
        "weight decay 0.01": {**TUNED, "phase2.weight_decay": 0.01},
        "attention dropout alone": {**TUNED, "layer.input_dropout": 0.0, "layer.layer_dropout": 0.0},
    }),
    "memory": ((50,), {
        "random init": {**PER_HEAD, **RANDOM},
        "random init, untrained": {**PER_HEAD, **RANDOM, **UNTRAINED},
        "means to 10 tokens": {**PER_HEAD, "block.longest_mean": 10.0},
        "means to 40 tokens": PER_HEAD,
        "means to 40 tokens, untrained": {**PER_HEAD, **UNTRAINED},
        "means to 40 tokens, OACD rate 0.0005": {**PER_HEAD, "phase1.learning_rate": 0.0005},
        "bias nearest, means to 40 tokens": TUNED,
        "bias nearest, means to 40 tokens, OACD rate 0.002": {**TUNED, "phase1.learning_rate": 0.002},
        "bias nearest, means to 160 tokens": {**TUNED, "block.longest_mean": 160.0},
        "bias nearest, random init, std 0.01": {**TUNED, **RANDOM, "phase1.weight_std": 0.01},
    }),
    # Recipe `tuned` was also trained with 1,000 and 2,000 conversations.
    "full": ((100, 500), {
        "published": {"recipe": "published"}, "exact": EXACT, "tuned": TUNED, "tuned, copying": COPYING,
    }),
    "fair": ((10, 50, 100, 200, 500), {
        "contexts": {**CHUNKED, **FAST},
        "no contexts": {**OF_TOKENS, **FIFTY, **DECAYED, "layer": f"{BASELINES}:CurrentToken"},
        "tokens at the same slots": {**CHUNKED, **TOKENS, **DECAYED},
        "last 32 tokens": {**CHUNKED, **LAST, **DECAYED},
        "all 640 tokens": {**OF_TOKENS, **FIFTY, **DECAYED, **ALL_TOKENS},
        "GRU": {**OF_TOKENS, **FIFTY, **FAST, "layer": f"{BASELINES}:GRU"},
    }),
    "phase1": ((10, 50, 100, 200, 500), {
        "OACD": CHUNKED,
        "untrained": {**CHUNKED, **UNTRAINED},
        "random init, OACD": {**CHUNKED, **RANDOM},
        "random init, untrained": {**CHUNKED, **RANDOM, **UNTRAINED},
        "predictive": {**CHUNKED, **PREDICTIVE},
        "predictive and OACD": {**CHUNKED, **PREDICTIVE, "block.oacd_weight": 1.0},
        "autoencoding": {**CHUNKED, **UNTRAINED, "block": "plugins:AutoencodingBlock", "block.epochs": 40},
        "gated, untrained": {**CHUNKED, **UNTRAINED, "block": f"{BASELINES}:GatedBlock"},
        "exact": {**EXACT, **FIFTY},
        "exact, untrained": {**EXACT, **FIFTY, **UNTRAINED},
        "exact, decorrelation": {**EXACT, **FIFTY, "loss": "plugins:decorrelation"},
        "exact, last tokens": {**EXACT, **FIFTY, "loss": f"{BASELINES}:Recall"},
        "exact, next embedding": {**EXACT, **FIFTY, "loss": f"{BASELINES}:NextEmbedding"},
        "exact, one slot": {**EXACT, **FIFTY, "model.max_contexts": 1},
    }),
    # The original's experiment with its own sizes, with seed 42.
    "original": ((100, 500), {"published": {"recipe": "published", **FIFTY}, "exact": {**EXACT, **FIFTY}}),
    "table": ((10, 50), {
        "exact": {**EXACT, **FIFTY},
        "exact, directional table": {**EXACT, **FIFTY, "data.neighbours": "sides"},
    }),
    # What Phase 1 does to the mean of the contexts, and what the mean does in Phase 2.
    "mean": ((50, 500), {
        f"{name}, rate {rate}": {**variant, "phase2.learning_rate": rate}
        for rate in RATES for name, variant in MEANS.items()
    }),
    "mean_dropout": ((50,), {
        f"{name}, dropout {dropout}": {**variant, "model.attention_dropout": dropout}
        for dropout in (0.0, 0.3) for name, variant in MEANS.items()
    }),
    # Each variant makes one of the changes that the original proposes.
    "proposals": ((100,), {
        "base": PROPOSED,
        "interval 50": {**PROPOSED, "model.interval": 50},
        "interval 100": {**PROPOSED, "model.interval": 100},
        "64 contexts": {**PROPOSED, "model.max_contexts": 64},
        "dropout 0.3": {**PROPOSED, "model.attention_dropout": 0.3},
        "weight decay 0.1": {**PROPOSED, "phase2.weight_decay": 0.1},
        "variable count": {**PROPOSED, "model.kv_method": "variable"},
    }),
}  # fmt: skip


def configure(variant: Settings, samples: int, seed: int, preset: str = "offline") -> Any:
    """Build the configuration of one run."""
    settings = {"runtime.seed": seed, **variant}
    parts = {kind: settings.pop(kind) for kind in ("block", "loss", "layer") if kind in settings}
    return ctxkv.build_config(preset, settings.pop("recipe"), samples, settings, **parts)


def train(
    variants: Mapping[str, Settings],
    samples: Iterable[int],
    seeds: Iterable[int] = SEEDS,
    preset: str = "offline",
    workers: int = 1,
) -> dict[tuple[str, int, int], ctxkv.Run]:
    """Train all variants with all sizes and seeds. Return the runs by variant, size and seed."""
    names = [(name, size, seed) for size, seed, name in product(samples, seeds, variants)]
    configs = [configure(variants[name], size, seed, preset) for name, size, seed in names]
    return dict(zip(names, ctxkv.run_all(configs, workers), strict=True))


def rows_of(runs: Mapping[tuple[str, int, int], ctxkv.Run]) -> list[dict[str, Any]]:
    """Return the results of runs in the form of the files in `results/`: a row per variant and size."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for (name, samples, seed), run in runs.items():
        summary, made = run.summary, run.summary["provenance"]
        best, test = summary["phase2"], summary["test"]
        row = rows.setdefault((name, samples), {"variant": name, "samples": samples, "cells": []})
        row |= {key: made[key] for key in ("precision", "threads", "git_commit")}
        row |= {"train_tokens": summary["train_tokens"]}
        row |= {"trained": summary["parameters"]["trainable_phase2"]}
        cell = {key: best[key] for key in ("best_epoch", "val_ppl", "train_ppl")}
        cell |= {"test_ppl": test["ppl"], "test_conversations": [loss for _, loss in test["conversations"]]}
        cell |= {"seconds": summary["phase1"]["seconds"] + best["seconds_per_epoch"] * len(best["epochs"])}
        epochs = [{key: epoch[key] for key in EPOCH} for epoch in best["epochs"]]
        row["cells"].append({"seed": seed, **rounded(cell), "epochs": rounded(epochs)})
    return [*rows.values()]


def rounded(value: Any) -> Any:
    """Round all numbers in a value to four decimals."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a part of the study.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--variants", nargs="+", help="names of rows (default: all)")
    parser.add_argument("--samples", nargs="+", type=int, help="numbers of conversations (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=1, help="number of runs at the same time")
    parser.add_argument("--to", type=Path, help="file for the results, in the form of results/*/sweep.json")
    options = parser.parse_args()
    sizes, variants = PARTS[options.part]
    chosen = {name: variants[name] for name in options.variants or variants}
    runs = train(chosen, options.samples or sizes, options.seeds, workers=options.workers)
    columns = ["test_ppl", "val_ppl", "train_ppl", "best_epoch", "parameters"]
    names = pd.MultiIndex.from_tuples(runs, names=("variant", "samples", "seed"))
    print(ctxkv.results([*runs.values()])[columns].set_axis(names).to_string())
    if options.to:
        rows = "[\n" + ",\n".join(json.dumps(row) for row in rows_of(runs)) + "\n]"
        options.to.write_text(f'{{"variants": {json.dumps(chosen)},\n"rows": {rows}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
