"""Plausible finished runs for tests of figures and reports; nothing is trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ctxkv_lib.files import checksums, write_json
from ctxkv_lib.runs.build import parameter_counts, unallocated_model
from ctxkv_lib.runs.config import ExperimentConfig
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.runs.steps import STEPS
from ctxkv_lib.runs.summary import Run, run_from_records, summarize
from ctxkv_lib.store import Record, inputs_of

# (train PPL, val PPL, val accuracy) per epoch; they are near the published numbers, but never equal
EPOCHS = {
    100: [
        (2905.2, 580.3, 0.113),
        (420.7, 441.9, 0.134),
        (198.6, 366.4, 0.159),
        (111.8, 391.2, 0.153),
        (83.4, 428.6, 0.154),
        (61.1, 477.5, 0.156),
    ],
    500: [
        (571.3, 298.4, 0.158),
        (229.9, 229.6, 0.175),
        (107.4, 179.2, 0.204),
        (60.9, 186.5, 0.203),
        (48.8, 196.1, 0.202),
        (33.7, 211.3, 0.201),
    ],
}
TOKENS = {100: 122_795, 500: 587_970}


def sample_run(
    samples: int = 500,
    preset: str = "colab",
    gpu: bool = True,
    settings: dict[str, Any] | None = None,
    epochs: list[tuple[float, float, float]] | None = None,
    recipe: str = "published",
    path: Path = Path("runs/sample"),
    plugins: dict[str, Any] | None = None,
) -> Run:
    """Make a finished run without a folder.

    Args:
        settings: settings that differ from the preset and the recipe.
        epochs: (train PPL, val PPL, val accuracy) per epoch; by default six, of which the third is best.
    """
    config = build_config(preset, recipe, samples, settings, **(plugins or {}))
    rows = epochs or EPOCHS.get(samples, EPOCHS[500])
    return run_from_records(path, _records(config, epoch_lines(rows), gpu), config)


def write_run(path: Path, samples: int = 500, settings: dict[str, Any] | None = None, **plugins: Any) -> Path:
    """Write a sample run and its records into the folder `path`, and return `path`."""
    config = build_config("colab", "published", samples, settings, **plugins)
    records = _records(config, epoch_lines(EPOCHS[samples]), gpu=True)
    write_json(path / "config.json", config.to_dict())
    write_json(path / "summary.json", summarize(config, records))
    records["settings"] = replace(records["settings"], files=checksums(path, ["config.json"]))
    records["results"] = Record(inputs_of({}, {}), {}, checksums(path, ["summary.json"]))
    for name, record in records.items():
        record.write(path / STEPS / f"{name}.json")
    return path


def phase1_lines(iterations: int = 17) -> list[dict[str, Any]]:
    """Return metrics of Phase 1 from iteration 2 on: the loss falls, the convergence rate rises to 93%."""
    return [
        {
            "stage": "phase1",
            "iteration": n,
            "loss": 1.25 + 4.2 * 0.7 ** (n - 2),
            "convergence_rate": 0.93 * ((n - 1) / (iterations - 1)) ** 3,
            "dispersion": 15.0,
            "centroid": 7.0 / n,
            "effective_rank": 0.6 + 0.01 * n,
            "seconds": 0.4,
        }
        for n in range(2, iterations + 1)
    ]


def epoch_lines(rows: list[tuple[float, float, float]]) -> list[dict[str, Any]]:
    lines, lowest, waited = [], float("inf"), 0
    for number, (train_ppl, val_ppl, val_acc) in enumerate(rows, start=1):
        waited = 0 if val_ppl < lowest else waited + 1
        lowest = min(lowest, val_ppl)
        line = {"epoch": number, "train_ppl": train_ppl, "val_ppl": val_ppl, "val_acc": val_acc}
        line |= {"improved": waited == 0, "no_improve": waited, "seconds": 12.5}
        lines.append({"stage": "phase2", **line})
    return lines


def _records(config: ExperimentConfig, epochs: list[dict[str, Any]], gpu: bool) -> dict[str, Record]:
    """Return the records of a run's steps, from which the package builds the summary."""

    def memory(stage: str, cpu: float, on_gpu: float) -> dict[str, Any]:
        values = {"cpu_gib": cpu, "cpu_peak_gib": cpu + 0.3}
        values |= {"gpu_gib": on_gpu if gpu else None, "gpu_peak_gib": on_gpu + 0.8 if gpu else None}
        return {"stage": stage, **values}

    model, samples = unallocated_model(config), config.data.samples
    phase1 = {"iterations": 17, "convergence_rate": 0.93, "stop_reason": "converged", "seconds": 6.4}
    early = epochs[-1]["no_improve"] >= config.phase2.patience
    contexts = {
        "phase1": {**phase1, "effective_rank": 0.807, "context_method": config.phase1.context_method},
        "tokens": {"train": TOKENS.get(samples, 1_176 * samples), "val": 22_723},
        "caches_mib": {"train_ctx": 575, "train_emb": 152, "val_ctx": 23, "val_emb": 0.2, "total": 750.2},
        "objective": 0,
    }
    trained = {
        "contexts": contexts,
        "parameters": parameter_counts(model),
        "offsets": model.window.offsets,
        "stop_reason": "early_stopping" if early else "max_epochs",
        "provenance": {
            "seed": config.runtime.seed,
            "date": "2026-01-31",
            "versions": {"python": "3.11.9", "torch": "2.11.0"},
            "device": "NVIDIA H100" if gpu else "cpu (x86_64, 2 threads)",
            "git_commit": "0123abc",
            "data": {"source": config.data.source, "validation_fingerprint": "bb"},
            "embeddings": {"table": config.data.table},
            "precision": "bf16",
            "caches": "311 MiB on cuda, 20,000 MiB free",
        },
    }
    epochs = [{**line, "memory": memory(f"epoch {line['epoch']}", 2.9, 0.6)} for line in epochs]
    snapshots = [
        memory("data loaded", 1.3, 0.0),
        memory("model built", 1.9, 0.3),
        memory("phase 1 done", 2.7, 0.4),
        memory("phase 2 prepared", 2.8, 0.5),
    ]
    settings = {name: value for name, value in config.flat().items() if not name.endswith(".code")}
    none = inputs_of({}, {})
    decided = {"config": config.to_dict(), "precision": "bf16", "threads": 1}
    return {
        "settings": Record(inputs_of(settings, {}), numbers=decided),
        "phase2": Record(none, numbers=trained, metrics=phase1_lines() + epochs, memory=snapshots),
        "test": Record(none, {"phase2": Record(none).output}),
    }
