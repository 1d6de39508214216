"""Numbers of the original's two runs, in the shape of `summary.json`.

They come from the report *Context-KV Attention, 500 samples* of 2025-12-03 (research repository
`rato-tokyo/new-llm`). What was not published is None or an empty list. Perplexities are per GPT-2 token,
shares 0..1, times in seconds on an NVIDIA L4.
"""

from typing import Any

from .config import ExperimentConfig, build_config, flat

Rows = list[dict[str, Any]]
CACHES = ("train_ctx", "train_emb", "val_ctx", "val_emb", "total")


def _rows(columns: str, *rows: tuple) -> Rows:
    return [dict(zip(columns.split(), row, strict=True)) for row in rows]


def _phase1(convergence_rate: float, seconds: float, effective_rank: float) -> dict[str, Any]:
    ended = {"iterations": 18, "convergence_rate": convergence_rate, "stop_reason": "converged"}
    return {**ended, "seconds": seconds, "effective_rank": effective_rank}


def _phase2(epochs: Rows, best_epoch: int, seconds: float | None) -> dict[str, Any]:
    """Complete the epochs: both runs improved in each up to the best, and in none after it."""
    for line in epochs:
        after_best = max(0, line["epoch"] - best_epoch)
        line |= {"improved": not after_best, "no_improve": after_best, "seconds": seconds}
    best = epochs[best_epoch - 1]
    return {
        "best_epoch": best_epoch,
        **{name: best[name] for name in ("val_ppl", "val_acc", "train_ppl")},
        "train_val_ratio": best["val_ppl"] / best["train_ppl"],
        "stop_reason": "early_stopping",
        "seconds_per_epoch": seconds,
        "epochs": epochs,
    }


def _summary(
    samples: int, train_tokens: int, phase1: dict, phase2: dict, memory: Rows, caches_mib: dict
) -> dict[str, Any]:
    window = {"interval": 20, "max_contexts": 32, "tokens": 640, "theoretical_max": train_tokens // 20 + 1}
    return {
        "samples": samples,
        "train_tokens": train_tokens,
        "val_tokens": 22_723,
        "parameters": {"total": 45_163_264, "trainable_phase2": 6_301_440},
        "context_window": window,
        "phase1": phase1,
        "phase2": phase2,
        "memory": memory,
        "caches_mib": caches_mib,
        "caches_dense_fp32_mib": caches_mib,
        "provenance": {"precision": "fp32"},
    }


_EPOCHS_100 = _rows(
    "epoch train_ppl val_ppl val_acc",
    (1, 3085.4, 572.0, 0.116),
    (2, 413.9, 436.8, 0.137),
    (3, 276.8, 380.3, 0.151),
    (4, 199.0, 374.2, 0.157),
    (5, 148.7, 361.0, 0.162),
    (6, 111.5, 387.9, 0.155),
    (7, 81.9, 424.1, 0.161),
    (8, 59.8, 484.4, 0.160),
)
_EPOCHS_500 = _rows(
    "epoch train_ppl val_ppl val_acc",
    (1, 559.6, 291.2, 0.162),
    (2, 222.4, 225.1, 0.177),
    (3, 149.1, 196.7, 0.194),
    (4, 106.0, 181.9, 0.199),
    (5, 78.4, 175.7, 0.209),
    (6, 59.6, 183.0, 0.206),
    (7, 46.1, 193.1, 0.209),
    (8, None, None, None),  # stopped here; its numbers were not published
)
_MEMORY_500 = _rows(
    "stage cpu_gib gpu_gib cpu_peak_gib gpu_peak_gib",
    ("data loaded", 1.2, 0.0, None, None),
    ("model built", 2.1, 0.2, None, None),
    ("phase 1 done", 5.6, 0.2, None, None),
    ("phase 2 prepared", 5.6, 0.2, None, None),
)
_CACHES_500 = dict(zip(CACHES, (574, 1723, 22, 67, 2386), strict=True))

PUBLISHED: dict[int, dict[str, Any]] = {
    100: _summary(
        samples=100,
        train_tokens=122_795,
        phase1=_phase1(convergence_rate=0.92, seconds=7.0, effective_rank=0.822),
        phase2=_phase2(_EPOCHS_100, best_epoch=5, seconds=None),
        memory=[],
        caches_mib=dict.fromkeys(CACHES),
    ),
    500: _summary(
        samples=500,
        train_tokens=587_970,
        phase1=_phase1(convergence_rate=0.91, seconds=30.0, effective_rank=0.821),
        phase2=_phase2(_EPOCHS_500, best_epoch=5, seconds=49.0),
        memory=_MEMORY_500,
        caches_mib=_CACHES_500,
    ),
}

_ITERATIONS = {
    100: ((2, 5.37, None), (7, 1.59, 0.01), (12, 1.70, 0.22), (15, 1.34, 0.55), (18, 1.26, 0.92)),
    500: ((2, 5.41, None), (7, 1.64, 0.00), (12, 1.72, 0.21), (15, 1.37, 0.54), (18, 1.30, 0.91)),
}
# The iterations of Phase 1 that were published, as lines of `metrics.jsonl`.
PUBLISHED_PHASE1: dict[int, Rows] = {
    samples: [{"stage": "phase1", **line} for line in _rows("iteration loss convergence_rate", *rows)]
    for samples, rows in _ITERATIONS.items()
}


def published_samples(config: ExperimentConfig) -> int | None:
    """Return the number of samples (100 or 500) of the original's run that `config` repeats, or None.

    A repetition has preset `colab`, recipe `published`, and the original's value of every setting that
    changes the training data or the arithmetic; any seed will do.
    """
    samples = config.data.samples
    if config.preset != "colab" or config.recipe != "published" or samples not in PUBLISHED:
        return None
    original = dict(flat(build_config("colab", "published", samples).to_dict()))
    same = (original.get(key) == value for key, value in flat(config.to_dict()) if not _is_free(key))
    return samples if all(same) else None


def _is_free(key: str) -> bool:
    """Return whether a setting changes neither the training data nor the arithmetic."""
    if key.startswith("runtime."):
        return key != "runtime.precision"
    return key == "data.test_samples"
