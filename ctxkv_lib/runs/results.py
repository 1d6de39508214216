"""What a finished run has found: its summary and metrics."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import expanded, read_json
from ..method.config import ModelConfig
from ..method.loop import Metric
from ..method.memory import mib
from ..progress import counted
from .config import ExperimentConfig, config_from_dict
from .folder import RunFolder, Stage

MEASUREMENTS = ("ngrams", "probe")
EPOCH = ("epoch", "train_ppl", "val_ppl", "val_acc", "improved", "no_improve", "seconds")
FP32_BYTES = 4


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    path: Path
    config: ExperimentConfig
    summary: dict[str, Any]  # summary.json
    metrics: list[Metric]  # lines of metrics.jsonl, both phases

    def __repr__(self) -> str:
        ppl = self.summary["phase2"]["val_ppl"]
        return f"Run({str(self.path)!r}: {counted(self.summary['samples'])}, val PPL {ppl:,.1f})"

    @property
    def phase1(self) -> list[Metric]:
        """Return the lines of Phase 1, one an iteration."""
        return [line for line in self.metrics if line["stage"] == "phase1"]


def load_run(path: Path | str, *stages: str) -> Run:
    """Read a finished run, after a check of the files of its results and of these stages.

    Raises:
        UserError: there is no run, it is unfinished, or a file is damaged.
    """
    folder = RunFolder.read(path := expanded(path))
    for name in ("results", *stages):
        if name not in folder.stages:
            raise UserError(f"{path} has not finished; go on with `ctxkv run --out {path}`.")
        if lost := folder.stages[name].lost(path):
            raise UserError(f"{lost}; make it again with `ctxkv run --out {path}`.")
    metrics = [line for stage in folder.stages.values() for line in stage.metrics]
    return Run(path, config_from_dict(folder.config), read_json(path / "summary.json"), metrics)


def summarize(config: ExperimentConfig, contexts: dict[str, Any], phase2: Stage) -> dict[str, Any]:
    """Make the content of `summary.json` from the summary of the contexts and the stage of Phase 2."""
    train_tokens, val_tokens = contexts["tokens"]["train"], contexts["tokens"]["val"]
    epochs, made = phase2.metrics, phase2.result
    best = next(epoch for epoch in reversed(epochs) if epoch["improved"])
    return {
        "samples": config.data.samples,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "parameters": made["parameters"],
        "context_window": {**context_window(config.model, train_tokens), "offsets": made["offsets"]},
        "phase1": contexts["phase1"],
        "phase2": {
            "best_epoch": best["epoch"],
            **{name: best[name] for name in ("val_ppl", "val_acc", "train_ppl")},
            "train_val_ratio": best["val_ppl"] / best["train_ppl"],
            "stop_reason": made["stop_reason"],
            "seconds_per_epoch": round(sum(e["seconds"] for e in epochs) / len(epochs), 3),
            "epochs": [{name: epoch[name] for name in EPOCH} for epoch in epochs],
        },
        "memory": [*contexts["memory"], *made["memory"], *(epoch["memory"] for epoch in epochs)],
        "caches_mib": contexts["caches_mib"],
        "caches_dense_fp32_mib": dense_fp32_mib(train_tokens, val_tokens, config.model),
        "provenance": made["provenance"],
    }


def measured(folder: RunFolder) -> dict[str, Any]:
    """Return the measurements in a folder that were made of its present weights."""
    key = folder.stages["test"].key
    there = {name: folder.stages[name] for name in MEASUREMENTS if name in folder.stages}
    return {name: each.result for name, each in there.items() if each.key == key and each.result}


def context_window(model: ModelConfig, train_tokens: int | None) -> dict[str, int | None]:
    """Describe the window; `theoretical_max` is the number of contexts that it would have without a limit."""
    return {
        "interval": model.interval,
        "max_contexts": model.max_contexts,
        "tokens": model.context_window,
        "theoretical_max": train_tokens // model.interval + 1 if train_tokens else None,
    }


def dense_fp32_mib(train_tokens: int, val_tokens: int, model: ModelConfig) -> dict[str, float]:
    """Compute MiB of the original's layout: an fp32 context and embedding row for each input token."""
    sizes = {
        f"{split}_{kind}": (tokens - 1) * width * FP32_BYTES
        for split, tokens in (("train", train_tokens), ("val", val_tokens))
        for kind, width in (("ctx", model.context_dim), ("emb", model.hidden_size))
    }
    return {name: mib(size) for name, size in {**sizes, "total": sum(sizes.values())}.items()}
