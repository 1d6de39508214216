"""The published numbers of the published report's two runs, in the shape of `summary.json`.

What was not published is None (or absent from a list), so that a run and its published twin can stand
beside each other in any table or figure. Perplexities are per GPT-2 token; shares are 0..1; times are
those of an NVIDIA L4.
"""

from typing import Any

from .config import ExperimentConfig, build_config
from .ownership import flat

# Settings that change neither the training data nor the arithmetic of a run; any seed is a fair repetition.
FREE_SETTINGS = {
    "runtime.seed",
    "runtime.device",
    "runtime.embedding_cache",
    "runtime.contexts",
    "runtime.threads",
    "runtime.tracker",
    "data.test_samples",
}

_PARAMETERS = {"total": 45_163_264, "trainable_phase2": 6_301_440}
_NO_CACHES = dict.fromkeys(("train_ctx", "train_emb", "val_ctx", "val_emb", "total"))
_CACHES_500 = {"train_ctx": 574, "train_emb": 1723, "val_ctx": 22, "val_emb": 67, "total": 2386}

# (epoch, train PPL, val PPL, val accuracy)
_EPOCHS_100 = [
    (1, 3085.4, 572.0, 0.116),
    (2, 413.9, 436.8, 0.137),
    (3, 276.8, 380.3, 0.151),
    (4, 199.0, 374.2, 0.157),
    (5, 148.7, 361.0, 0.162),
    (6, 111.5, 387.9, 0.155),
    (7, 81.9, 424.1, 0.161),
    (8, 59.8, 484.4, 0.160),
]
_EPOCHS_500 = [
    (1, 559.6, 291.2, 0.162),
    (2, 222.4, 225.1, 0.177),
    (3, 149.1, 196.7, 0.194),
    (4, 106.0, 181.9, 0.199),
    (5, 78.4, 175.7, 0.209),
    (6, 59.6, 183.0, 0.206),
    (7, 46.1, 193.1, 0.209),
    (8, None, None, None),  # stopped here; its numbers were not published
]
# (stage, CPU GiB, GPU GiB); peaks were not published
_MEMORY_500 = [
    ("data loaded", 1.2, 0.0),
    ("model built", 2.1, 0.2),
    ("phase 1 done", 5.6, 0.2),
    ("phase 2 prepared", 5.6, 0.2),
]
# (iteration, loss, convergence rate)
_PHASE1_100 = [(2, 5.37, None), (7, 1.59, 0.01), (12, 1.70, 0.22), (15, 1.34, 0.55), (18, 1.26, 0.92)]
_PHASE1_500 = [(2, 5.41, None), (7, 1.64, 0.00), (12, 1.72, 0.21), (15, 1.37, 0.54), (18, 1.30, 0.91)]


def _epochs(rows: list[tuple], best_epoch: int, seconds: float | None) -> list[dict[str, Any]]:
    keys = ("epoch", "train_ppl", "val_ppl", "val_acc")
    lines = [dict(zip(keys, row, strict=True)) for row in rows]
    for line in lines:
        line["improved"] = line["epoch"] <= best_epoch  # both runs improved every epoch up to the best
        line["no_improve"] = max(0, line["epoch"] - best_epoch)
        line["seconds"] = seconds
    return lines


def _phase2(rows: list[tuple], best_epoch: int, seconds: float | None) -> dict[str, Any]:
    epochs = _epochs(rows, best_epoch, seconds)
    best = epochs[best_epoch - 1]
    return {
        "best_epoch": best_epoch,
        **{key: best[key] for key in ("val_ppl", "val_acc", "train_ppl")},
        "train_val_ratio": best["val_ppl"] / best["train_ppl"],
        "stop_reason": "early_stopping",
        "seconds_per_epoch": seconds,
        "epochs": epochs,
    }


def _phase1(rate: float, seconds: float, effective_rank: float) -> dict[str, Any]:
    return {
        "iterations": 18,
        "convergence_rate": rate,
        "stop_reason": "converged",
        "seconds": seconds,
        "effective_rank": effective_rank,
    }


def _memory(rows: list[tuple]) -> list[dict[str, Any]]:
    peaks = {"cpu_peak_gib": None, "gpu_peak_gib": None}
    return [{"stage": stage, "cpu_gib": cpu, "gpu_gib": gpu, **peaks} for stage, cpu, gpu in rows]


def _window(theoretical_max: int) -> dict[str, int]:
    return {"interval": 20, "max_contexts": 32, "tokens": 640, "theoretical_max": theoretical_max}


def _phase1_lines(rows: list[tuple]) -> list[dict[str, Any]]:
    keys = ("iteration", "loss", "convergence_rate")
    return [{"stage": "phase1", **dict(zip(keys, row, strict=True))} for row in rows]


PUBLISHED: dict[int, dict[str, Any]] = {
    100: {
        "samples": 100,
        "train_tokens": 122_795,
        "val_tokens": 22_723,
        "parameters": _PARAMETERS,
        "context_window": _window(6_140),
        "phase1": _phase1(rate=0.92, seconds=7.0, effective_rank=0.822),
        "phase2": _phase2(_EPOCHS_100, best_epoch=5, seconds=None),
        "memory": [],
        "caches_mib": _NO_CACHES,
        "caches_dense_fp32_mib": _NO_CACHES,
        "provenance": {"precision": "fp32"},
    },
    500: {
        "samples": 500,
        "train_tokens": 587_970,
        "val_tokens": 22_723,
        "parameters": _PARAMETERS,
        "context_window": _window(29_399),
        "phase1": _phase1(rate=0.91, seconds=30.0, effective_rank=0.821),
        "phase2": _phase2(_EPOCHS_500, best_epoch=5, seconds=49.0),
        "memory": _memory(_MEMORY_500),
        "caches_mib": _CACHES_500,
        "caches_dense_fp32_mib": _CACHES_500,
        "provenance": {"precision": "fp32"},
    },
}

# The iterations of Phase 1 that were published, as lines of `metrics.jsonl`.
PUBLISHED_PHASE1: dict[int, list[dict[str, Any]]] = {
    100: _phase1_lines(_PHASE1_100),
    500: _phase1_lines(_PHASE1_500),
}


def published_samples(config: ExperimentConfig) -> int | None:
    """Number of samples (100 or 500) of the published run that `config` repeats, or None.

    It repeats one only with the same data, model and training: preset `colab`, recipe `published`, nothing
    changed but `FREE_SETTINGS`.
    """
    samples = config.data.samples
    if config.preset != "colab" or config.recipe != "published" or samples not in PUBLISHED:
        return None
    original = build_config("colab", "published", samples)
    return samples if _fixed_settings(config) == _fixed_settings(original) else None


def _fixed_settings(config: ExperimentConfig) -> dict[str, Any]:
    return {key: value for key, value in flat(config.to_dict()) if key not in FREE_SETTINGS}
