"""The published report's proposals for next experiments, as small runs around one base experiment."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import PRESETS, ExperimentConfig
from ..progress import Listener
from ..runs.run_folder import Run, run_folder_of
from ..views.notebook import notebook_config
from .experiment import run

BASE = "base"
LEAST_CONVERSATIONS = 10
PRESET_SETTINGS = {"ci": {"phase2.max_epochs": 1}}  # all of them in a minute
Settings = dict[str, Any]


def base_config(preset: str, samples: int | None, recipe: str | None, seed: int | None) -> ExperimentConfig:
    """The small experiment that all proposals change: the preset's smaller count, but 10 conversations.

    Fewer than 10 conversations, for training or validation, hold less text than the widest window proposed.
    """
    smallest = max(LEAST_CONVERSATIONS, PRESETS[preset].samples[0]) if preset in PRESETS else None
    config = notebook_config(preset, samples or smallest, recipe, seed, PRESET_SETTINGS.get(preset))
    validation = max(LEAST_CONVERSATIONS, config.data.validation_samples)
    return config.replace({"data.validation_samples": validation})


def proposals(base: ExperimentConfig) -> dict[str, Settings]:
    """Name and changed settings of every proposal: each changes one thing of `base`."""
    model, phase2 = base.model, base.phase2
    interval, contexts = model.interval, model.max_contexts
    other = "variable" if model.kv_method == "fixed" else "fixed"
    dropout, decay = min(0.9, 3 * model.attention_dropout or 0.3), 10 * phase2.weight_decay or 0.1
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


def proposal_folders(
    base: ExperimentConfig, variants: Mapping[str, Settings], root: Path, seeds: Sequence[int] | None = None
) -> list[Path]:
    """The run folders of `run_proposals` with the same arguments."""
    return [run_folder_of(c, root) for settings in variants.values() for c in _configs(base, settings, seeds)]


def _configs(
    base: ExperimentConfig, settings: Settings, seeds: Sequence[int] | None
) -> list[ExperimentConfig]:
    return [base.replace({**settings, "runtime.seed": seed}) for seed in seeds or [base.runtime.seed]]


def run_proposals(
    base: ExperimentConfig,
    variants: Mapping[str, Settings],
    root: Path,
    seeds: Sequence[int] | None = None,
    listener: Listener = lambda _: None,
    report: Callable[[str], None] = print,
) -> dict[str, list[Run]]:
    """Do what is not yet done of every variant with every seed.

    Args:
        variants: `{name: settings on top of base}`.
        root: folder of the run folders.
        seeds: None takes the base's own.
        report: gets a line of text for each variant that is done.

    Returns:
        `{name: one run a seed}`.
    """
    runs: dict[str, list[Run]] = {}
    for name, settings in variants.items():
        configs = _configs(base, settings, seeds)
        runs[name] = [run(config, run_folder_of(config, root), listener) for config in configs]
        best = ", ".join(f"{ppl:,.1f}" for ppl in best_ppls(runs)[name])
        report(f"{name}: best validation PPL {best}")
    return runs


def best_ppls(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[float]]:
    """`{name: best validation PPL of each seed}`."""
    return {name: [each.summary["phase2"]["val_ppl"] for each in group] for name, group in runs.items()}
