"""What a run has found: `summary.json` and the metrics, from the stages of its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import digest, expanded, read_json
from ..method.config import ModelConfig
from ..method.loop import Metric, epochs_of
from ..method.memory import mib
from ..progress import counted
from .config import ExperimentConfig
from .folder import RESULTS, RunFolder, Stage
from .keys import MEASUREMENTS, stage_key

EPOCH = ("epoch", "train_ppl", "val_ppl", "val_acc", "improved", "no_improve", "seconds")
FP32_BYTES = 4


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder; or what is there of one that is only prepared."""

    path: Path
    config: ExperimentConfig
    summary: dict[str, Any]  # summary.json
    metrics: list[Metric]  # of both phases; as metrics.jsonl, and with memory

    def __repr__(self) -> str:
        phase2 = self.summary.get("phase2")
        result = f"val PPL {phase2['val_ppl']:,.1f}" if phase2 else "prepared"
        return f"Run({str(self.path)!r}: {counted(self.config.data.size('train'))}, {result})"

    @property
    def phase1(self) -> list[Metric]:
        """Return the lines of Phase 1, one an iteration."""
        return [line for line in self.metrics if line["stage"] == "phase1"]


def load_run(path: Path | str, *stages: str) -> Run:
    """Read a finished run, after a check of the files of its results and of these stages.

    Raises:
        UserError: there is no run, it is unfinished, or a file is damaged.
    """
    return finished_run(RunFolder.read(expanded(path)), *stages)


def finished_run(folder: RunFolder, *stages: str) -> Run:
    """Return the run in a folder that has been read; arguments and errors as of `load_run`."""
    path = folder.path
    for name in (RESULTS, *stages):
        if name not in folder.stages:
            raise UserError(f"{path} has not finished; go on with `ctxkv run --out {path}`.")
        if damage := folder.stages[name].damage(path):
            raise UserError(f"{damage}; make it again with `ctxkv run --out {path}`.")
    return Run(path, folder.config, read_json(path / "summary.json"), folder.metrics())


def context_summary(stages: dict[str, Stage]) -> dict[str, Any]:
    """Return `tokens`, `phase1`, `memory` and `caches_mib` of the summary, from Phase 1 and the caches."""
    phase1, caches = stages["phase1"].result, stages["caches"].result
    return {**phase1, **caches, "phase1": {**phase1["phase1"], **caches["phase1"]}}


def summarize(folder: RunFolder) -> dict[str, Any]:
    """Make the content of `summary.json` from the finished stages."""
    config, contexts, phase2 = folder.config, context_summary(folder.stages), folder.stages["phase2"]
    train_tokens, val_tokens = contexts["tokens"]["train"], contexts["tokens"]["val"]
    epochs, result = epochs_of(phase2.metrics), phase2.result
    best = next(epoch for epoch in reversed(epochs) if epoch["improved"])
    test = folder.stages["test"].result
    return {
        "samples": config.data.samples,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "parameters": result["parameters"],
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
        "memory": [*contexts["memory"], *result["memory"], *(epoch["memory"] for epoch in epochs)],
        "caches_mib": contexts["caches_mib"],
        "caches_dense_fp32_mib": dense_fp32_mib(train_tokens, val_tokens, config.model),
        "provenance": result["provenance"],
        **({"test": test} if test else {}),
        **measurements(folder),
    }


def measurements(folder: RunFolder) -> dict[str, Any]:
    """Return the measurements in a folder that are of its tested weights."""
    stages = {name: folder.stages[name] for name in MEASUREMENTS if name in folder.stages}
    valid = {name: stage for name, stage in stages.items() if stage.key == stage_key(name, folder, {})}
    return {name: stage.result for name, stage in valid.items() if stage.result}


def results_key(folder: RunFolder) -> str:
    """Digest what the results are made of: the stages up to the test, and measurements."""
    return digest([folder.stages["test"].key, measurements(folder)])


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
