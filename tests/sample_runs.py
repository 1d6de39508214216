"""Plausible finished runs for tests of figures and reports: nothing is trained."""

from pathlib import Path
from typing import Any

from ctxkv_lib.files import write_json
from ctxkv_lib.report.info import describe
from ctxkv_lib.runs.build import unallocated_model
from ctxkv_lib.runs.config import ExperimentConfig
from ctxkv_lib.runs.folder import claimed
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.runs.summary import Run, context_window, dense_fp32_mib

# (train PPL, val PPL, val accuracy) by epoch; near the published runs, equal to none of their numbers
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
MEMORY = [("data loaded", 1.3, 0.0), ("model built", 1.9, 0.3), ("phase 1 done", 2.7, 0.4)]
TOKENS = {100: 122_795, 500: 587_970}
SIZES = ("samples", "train_tokens", "val_tokens", "parameters", "context_window", "caches_dense_fp32_mib")


def sample_run(
    samples: int = 500,
    preset: str = "colab",
    gpu: bool = True,
    settings: dict[str, Any] | None = None,
    epochs: list[tuple[float, float, float]] | None = None,
    recipe: str = "published",
    path: Path = Path("runs/sample"),
) -> Run:
    """A finished run without a folder.

    Args:
        settings: settings of the configuration on top of the preset's and recipe's.
        epochs: (train PPL, val PPL, val accuracy) by epoch; by default six, the third the best.
    """
    config = build_config(preset, recipe, samples, settings)
    lines = epoch_lines(epochs or EPOCHS.get(samples, EPOCHS[500]))
    metrics = [*phase1_lines(), *({"stage": "phase2", **line} for line in lines)]
    return Run(path, config, _summary(config, lines, gpu), metrics)


def write_run(path: Path, *args: Any, **options: Any) -> Path:
    """Write a sample run into `path`, with its stage records, and return it; options as of `sample_run`."""
    run = sample_run(*args, **options, path=path)
    with claimed(path, run.config, {"code": "", "data": "", "precision": "bf16"}) as folder:
        write_json(path / "summary.json", run.summary)
        summary = run.summary
        tokens = {name: summary[f"{name}_tokens"] for name in ("train", "val")}
        parts = {
            "phase1": {"phase1": summary["phase1"], "memory": []},
            "caches": {"phase1": {}, "tokens": tokens, "caches_mib": summary["caches_mib"]},
            "phase2": {
                **{name: summary[name] for name in ("parameters", "provenance", "memory")},
                "offsets": summary["context_window"]["offsets"],
                "stop_reason": summary["phase2"]["stop_reason"],
            },
        }
        for stage in ("phase1", "caches", "phase2", "model", "test"):
            metrics = [{"memory": {}, **line} for line in run.metrics if line["stage"] == stage]
            folder.finish(stage, "", (), parts.get(stage, {}), metrics)
        folder.finish("results", "", (path / "config.json", path / "summary.json"))
    return path


def phase1_lines(iterations: int = 17) -> list[dict[str, Any]]:
    """Phase 1 from iteration 2 on: the loss falls, the convergence rate rises to 93%."""
    return [
        {
            "stage": "phase1",
            "iteration": n,
            "loss": 1.25 + 4.2 * 0.7 ** (n - 2),
            "convergence_rate": 0.93 * ((n - 1) / (iterations - 1)) ** 3,
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
        lines.append({**line, "improved": waited == 0, "no_improve": waited, "seconds": 12.5})
    return lines


def _summary(config: ExperimentConfig, epochs: list[dict[str, Any]], gpu: bool) -> dict[str, Any]:
    samples = config.data.samples
    train_tokens = TOKENS.get(samples, 1_176 * samples)
    slots = {"offsets": None if "mixer" in config.plugins else unallocated_model(config).window.offsets}
    sizes = describe(config, train_tokens, 22_723) | {
        "context_window": {**context_window(config.model, train_tokens), **slots},
        "caches_dense_fp32_mib": dense_fp32_mib(train_tokens, 22_723, config.model),
    }
    best = min(epochs, key=lambda line: line["val_ppl"])
    early = epochs[-1]["no_improve"] >= config.phase2.patience
    return {
        **{part: sizes[part] for part in SIZES},
        "phase1": {
            "iterations": 17,
            "convergence_rate": 0.93,
            "stop_reason": "converged",
            "seconds": 6.4,
            "effective_rank": 0.807,
        },
        "phase2": {
            **{key: best[key] for key in ("val_ppl", "val_acc", "train_ppl")},
            "best_epoch": best["epoch"],
            "train_val_ratio": best["val_ppl"] / best["train_ppl"],
            "stop_reason": "early_stopping" if early else "max_epochs",
            "seconds_per_epoch": 12.5,
            "epochs": epochs,
        },
        "memory": _memory(len(epochs), gpu),
        "caches_mib": {"train_ctx": 575, "train_emb": 152, "val_ctx": 23, "val_emb": 0.2, "total": 750.2},
        "provenance": _provenance(config, gpu),
    }


def _memory(epochs: int, gpu: bool) -> list[dict[str, Any]]:
    rows = [*MEMORY, ("phase 2 prepared", 2.8, 0.5), *((f"epoch {n + 1}", 2.9, 0.6) for n in range(epochs))]
    return [
        {
            "stage": stage,
            "cpu_gib": cpu,
            "gpu_gib": on_gpu if gpu else None,
            "cpu_peak_gib": cpu + 0.3,
            "gpu_peak_gib": on_gpu + 0.8 if gpu else None,
        }
        for stage, cpu, on_gpu in rows
    ]


def _provenance(config: ExperimentConfig, gpu: bool) -> dict[str, Any]:
    return {
        "seed": config.runtime.seed,
        "date": "2026-01-31",
        "versions": {"python": "3.11.9", "torch": "2.11.0"},
        "device": "NVIDIA H100" if gpu else "cpu (x86_64, 2 threads)",
        "git_commit": "0123abc",
        "data": {"source": config.data.source, "train_fingerprint": "aa", "validation_fingerprint": "bb"},
        "embeddings": {"table": config.data.table, "fingerprint": "cc"},
        "precision": "bf16",
        "caches": "311 MiB on cuda, 20,000 MiB free",
    }
