"""`ctxkv bench`: speed and memory of this package, on the machine at hand and on a real token stream.

All in one process and side by side: against the original's loops (`original.py`) and the floor that the
machine's own rate of matrix products sets (`training.py`), and against a GPT-2 block with its key-value cache
(`generation.py`).
"""

from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...experiments import prepare
from ...files import write_json
from ...runs.config import ExperimentConfig
from ...runs.provenance import PRECISIONS, device_name, versions
from ...runs.published import PUBLISHED
from ...views.axes import save
from .figure import bench_figure
from .generation import measure_generation
from .measure import product_rate
from .table import bench_table as bench_table
from .training import compare, phase1_makers, phase2_makers, scaling

GIGA = 1e9
# What the original's loops compute; other settings would be timed against another model.
ORIGINAL = {
    "memory": "contexts",
    "kv_method": "fixed",
    "anchor": "current",
    "slots": "uniform",
    "slot_bias": "none",
    "sink": "none",
    "output": "residual",
    "input_dropout": 0.0,
    "layer_dropout": 0.0,
}


def bench(config: ExperimentConfig, run_folder: Path, out: Path, rounds: int) -> dict[str, Any]:
    """Measure everything, and leave `bench.json` and `bench.png` in `out`.

    Args:
        config: the training stream, shapes and batch sizes to measure with.
        run_folder: of that experiment; it is brought as far as its contexts.
        rounds: timed repetitions; medians are reported.

    Raises:
        UserError: as `prepare`; settings that the original's loops do not have; too few rounds.
    """
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}; allowed: 1 or more.")
    if others := [
        f"model.{key}={value}" for key, value in ORIGINAL.items() if getattr(config.model, key) != value
    ]:
        raise UserError(f"The original's loops know {', '.join(others)} only; bench measures with these.")
    prepared = prepare(config, run_folder)
    model, device = prepared.model, prepared.model.device
    ids = prepared.caches["train"].ids.to(device)
    contexts = prepared.caches["train"].contexts.to(device, torch.float32)
    rates = {name: product_rate(dtype, device) for name, dtype in PRECISIONS.items()}
    makers = {
        "phase1": phase1_makers(model, ids, config),
        "phase2": phase2_makers(model, ids, contexts, config),
    }
    batch = min(config.phase2.batch_size, len(ids) - 1)
    head = {"phase2": 4 * batch * config.model.vocab_size * config.model.hidden_size}  # two products
    training = {
        phase: compare(made, rates, rounds, device, phase, head.get(phase, 0))
        for phase, made in makers.items()
    }
    steps = PUBLISHED[500]["train_tokens"] / config.phase2.batch_size
    results = {
        "device": device_name(device),
        "versions": versions(),
        "preset": config.preset,
        "samples": config.data.samples,
        "tokens": len(ids) - 1,
        "rounds": rounds,
        "product_gflop_per_second": {name: rate / GIGA for name, rate in rates.items()},
        **training,
        "published_epoch_seconds": {n: row["seconds"] * steps for n, row in training["phase2"].items()},
        "scaling": scaling(model, ids, config, rounds),
        "generation": measure_generation(model, rounds),
    }
    write_json(out / "bench.json", results)
    save(bench_figure(results), out / "bench.png")
    return results
