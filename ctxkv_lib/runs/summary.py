"""The results of a run: `summary.json` and the metrics, collected from the records of its steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import expanded, mib
from ..method.callback import Metric, epochs_of
from ..method.config import ModelConfig
from ..progress import format_count
from ..store import Record
from .config import ExperimentConfig
from .steps import SETTINGS, config_of, finished

EPOCH = ("epoch", "train_ppl", "val_ppl", "val_acc", "improved", "no_improve", "seconds")
FP32_BYTES = 4
NGRAMS = "ngrams"  # a step that is computed only on request


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
        return f"Run({str(self.path)!r}: {format_count(self.config.data.samples)}, {result})"

    @property
    def phase1(self) -> list[Metric]:
        """Return the metrics of Phase 1, one per iteration."""
        return [line for line in self.metrics if line["stage"] == "phase1"]


def load_run(path: Path | str) -> Run:
    """Read a finished run. Raises UserError if there is no run in the folder, or it is unfinished."""
    folder = expanded(path)
    return run_from_records(folder, finished(folder, SETTINGS, "phase2", "test", only_size=True))


def run_from_records(
    path: Path, records: Mapping[str, Record], config: ExperimentConfig | None = None
) -> Run:
    """Return a finished run from the records of its steps."""
    config = config or config_of(path)
    return Run(path, config, summarize(config, records), records["phase2"].metrics)


def summarize(config: ExperimentConfig, records: Mapping[str, Record]) -> dict[str, Any]:
    """Build the content of `summary.json` from the records of finished steps."""
    phase2, test = records["phase2"], records["test"].numbers
    result, phase1 = phase2.numbers, phase2.numbers["contexts"]
    train_tokens, val_tokens = phase1["tokens"]["train"], phase1["tokens"]["val"]
    epochs = epochs_of(phase2.metrics)
    best = next(epoch for epoch in reversed(epochs) if epoch["improved"])
    loss_weights = {"objective": phase1["objective"]} if phase1["objective"] else {}
    ngrams = records.get(NGRAMS)
    is_of_test = ngrams and ngrams.inputs["before"]["test"] == records["test"].inputs
    return {
        "samples": config.data.samples,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "parameters": {**result["parameters"], **loss_weights},
        "context_window": {**context_window(config.model, train_tokens), "offsets": result["offsets"]},
        "phase1": phase1["phase1"],
        "phase2": {
            "best_epoch": best["epoch"],
            **{name: best[name] for name in ("val_ppl", "val_acc", "train_ppl")},
            "train_val_ratio": best["val_ppl"] / best["train_ppl"],
            "stop_reason": result["stop_reason"],
            "seconds_per_epoch": round(sum(epoch["seconds"] for epoch in epochs) / len(epochs), 3),
            "epochs": [{name: epoch[name] for name in EPOCH} for epoch in epochs],
        },
        "memory": [*phase2.memory, *(epoch["memory"] for epoch in epochs)],
        "caches_mib": phase1["caches_mib"],
        "caches_dense_fp32_mib": dense_fp32_mib(train_tokens, val_tokens, config.model),
        "provenance": result["provenance"],
        **({"test": test} if test else {}),
        **({NGRAMS: ngrams.numbers} if ngrams and is_of_test else {}),
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
