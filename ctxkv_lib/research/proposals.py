"""The published report's proposals for next experiments, as small runs around one base experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.verdicts import stronger_decay
from ..runs.config import ExperimentConfig
from ..runs.configure import compared_samples
from ..runs.run_folder import Run
from ..views.notebook import notebook_config

BASE = "base"
LEAST_CONVERSATIONS = 10
PRESET_SETTINGS = {"ci": {"phase2.max_epochs": 1, "data.test_samples": 0}}  # all of them in a minute


def base_config(preset: str, samples: int | None, recipe: str | None, seed: int | None) -> ExperimentConfig:
    """Make the small experiment that all proposals change: the preset's smaller count, at least 10.

    With fewer than 10 conversations, a stream is shorter than the widest window proposed.
    """
    if samples is None:
        samples = max(LEAST_CONVERSATIONS, compared_samples(notebook_config(preset))[0])
    config = notebook_config(preset, samples, recipe, seed, PRESET_SETTINGS.get(preset))
    validation = max(LEAST_CONVERSATIONS, config.data.validation_samples)
    return config.replace({"data.validation_samples": validation})


def proposals(base: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """Return the changed settings of each proposal, by name: each changes one thing of `base`."""
    model, phase2 = base.model, base.phase2
    interval, contexts = model.interval, model.max_contexts
    other = "variable" if model.kv_method == "fixed" else "fixed"
    dropout = min(0.9, round(3 * model.attention_dropout, 6) or 0.3)
    decay = stronger_decay(phase2.weight_decay) or 0.1
    return {
        BASE: {},
        f"interval {5 * interval // 2}": {"model.interval": 5 * interval // 2},
        f"interval {5 * interval}": {"model.interval": 5 * interval},
        f"max_contexts {2 * contexts}": {"model.max_contexts": 2 * contexts},
        f"{2 * base.data.samples} samples": {"data.samples": 2 * base.data.samples},
        f"dropout {dropout:g}": {"model.attention_dropout": dropout},
        f"weight decay {decay:g}": {"phase2.weight_decay": decay},
        f"{other} count": {"model.kv_method": other},
    }


def best_ppls(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[float]]:
    """Return `{name: best validation PPL of each seed}`."""
    return {name: [each.summary["phase2"]["val_ppl"] for each in group] for name, group in runs.items()}
