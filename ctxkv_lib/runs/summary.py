"""The results of a run: `summary.json` and the metrics, collected from the records of its stages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import expanded, mib, read_json
from ..method.config import ModelConfig
from ..method.loop import Metric, epochs_of
from ..progress import format_count
from .config import ExperimentConfig
from .folder import RESULTS, RunFolder

EPOCH = ("epoch", "train_ppl", "val_ppl", "val_acc", "improved", "no_improve", "seconds")
FP32_BYTES = 4
TRAININGS = ("contexts", "phase2")  # stages that have metrics
NGRAMS = "ngrams"  # stage computed only on request


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder, or a run that is only prepared for Phase 2."""

    path: Path
    config: ExperimentConfig
    summary: dict[str, Any]  # content of summary.json
    # Metrics of both phases: the lines of metrics.jsonl, with the memory use of each epoch.
    metrics: list[Metric]

    def __repr__(self) -> str:
        phase2 = self.summary.get("phase2")
        result = f"val PPL {phase2['val_ppl']:,.1f}" if phase2 else "prepared"
        return f"Run({str(self.path)!r}: {format_count(self.config.data.size('train'))}, {result})"

    @property
    def phase1(self) -> list[Metric]:
        """Return the metrics of Phase 1, one per iteration."""
        return [line for line in self.metrics if line["stage"] == "phase1"]


def load_run(path: Path | str, *parts: str) -> Run:
    """Read a finished run after checking the files of its results.

    Args:
        parts: more files and folders of the run to check, such as "caches".

    Raises:
        UserError: There is no run in the folder, the run is unfinished, or a file is damaged.
    """
    return finished_run(RunFolder.open(expanded(path)), *parts)


def finished_run(folder: RunFolder, *parts: str) -> Run:
    """Return the finished run in a folder whose records have been read.

    `parts` and the errors are the same as in `load_run`.
    """
    path = folder.path
    if not folder.holds(RESULTS):
        reason = folder.unreadable() or f"{path} has not finished"
        raise UserError(f"{reason}; continue with `ctxkv run --out {path}`.")
    damages = [folder.records[RESULTS].damage(path)]
    damages += [record.damage(path, parts=parts) for record in folder.records.values() if parts]
    if damage := next(filter(None, damages), ""):
        raise UserError(f"{damage}; recompute it with `ctxkv run --out {path} --again`.")
    return Run(path, folder.config, read_json(path / "summary.json"), folder.metrics(TRAININGS))


def summarize(folder: RunFolder) -> dict[str, Any]:
    """Build the content of `summary.json` from the finished stages."""
    config, phase2 = folder.config, folder.records["phase2"]
    contexts, result, test = (folder.records[name].result for name in ("contexts", "phase2", "test"))
    train_tokens, val_tokens = contexts["tokens"]["train"], contexts["tokens"]["val"]
    epochs = epochs_of(phase2.metrics)
    best = next(epoch for epoch in reversed(epochs) if epoch["improved"])
    return {
        "samples": config.data.samples,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "parameters": {**result["parameters"], **contexts.get("parameters", {})},
        "context_window": {**context_window(config.model, train_tokens), "offsets": result["offsets"]},
        "phase1": contexts["phase1"],
        "phase2": {
            "best_epoch": best["epoch"],
            **{name: best[name] for name in ("val_ppl", "val_acc", "train_ppl")},
            "train_val_ratio": best["val_ppl"] / best["train_ppl"],
            "stop_reason": result["stop_reason"],
            "seconds_per_epoch": round(sum(epoch["seconds"] for epoch in epochs) / len(epochs), 3),
            "epochs": [{name: epoch[name] for name in EPOCH} for epoch in epochs],
        },
        "memory": [
            *folder.records["contexts"].memory,
            *phase2.memory,
            *(epoch["memory"] for epoch in epochs),
        ],
        "caches_mib": contexts["caches_mib"],
        "caches_dense_fp32_mib": dense_fp32_mib(train_tokens, val_tokens, config.model),
        "provenance": result["provenance"],
        **({"test": test} if test else {}),
        **({NGRAMS: folder.records[NGRAMS].result} if folder.holds(NGRAMS) else {}),
    }


def context_window(model: ModelConfig, train_tokens: int | None) -> dict[str, int | None]:
    """Describe the context window. Without a limit, it would have up to `theoretical_max` contexts."""
    return {
        "interval": model.interval,
        "max_contexts": model.max_contexts,
        "tokens": model.context_window,
        "theoretical_max": train_tokens // model.interval + 1 if train_tokens else None,
    }


def dense_fp32_mib(train_tokens: int, val_tokens: int, model: ModelConfig) -> dict[str, float]:
    """Compute cache sizes in MiB for the original's layout: an fp32 context and embedding per input token."""
    sizes = {
        f"{split}_{kind}": (tokens - 1) * width * FP32_BYTES
        for split, tokens in (("train", train_tokens), ("val", val_tokens))
        for kind, width in (("ctx", model.context_dim), ("emb", model.hidden_size))
    }
    return {name: mib(size) for name, size in {**sizes, "total": sum(sizes.values())}.items()}
