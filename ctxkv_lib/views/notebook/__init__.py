"""What notebooks share: parameters from the environment, where runs live, and Google Drive."""

import os
import sys
from pathlib import Path
from typing import Any

from ...config import COMPARED_RATIO, PRESETS, ExperimentConfig
from ...data.local_files import configure
from ...errors import UserError
from ...runs.run_folder import ROOT_VARIABLE
from .drive import kept_on_drive as kept_on_drive

PARAMETERS = {"preset": str, "samples": int, "recipe": str, "seed": int}


def parameter(name: str) -> Any:
    """A notebook's parameter: `$CTXKV_PRESET`, `$CTXKV_SAMPLES`, `$CTXKV_RECIPE` or `$CTXKV_SEED`.

    Returns:
        the variable's value; without it, a preset that suits the machine, and None for the others, which
        leaves the choice to the preset.

    Raises:
        UserError: an unknown parameter, or a value of the wrong type.
    """
    if name not in PARAMETERS:
        raise UserError(f"parameter is {name!r}; allowed: {', '.join(PARAMETERS)}.")
    variable = f"CTXKV_{name.upper()}"
    value = os.environ.get(variable)
    if not value:
        return default_preset() if name == "preset" else None
    try:
        return PARAMETERS[name](value)
    except ValueError:
        raise UserError(f"{variable} is {value!r}; allowed: a whole number.") from None


def default_preset() -> str:
    """`colab` on Colab, where the Hub is near; `offline` elsewhere, which needs no network."""
    return "colab" if "google.colab" in sys.modules else "offline"


def notebook_config(
    preset: str,
    samples: int | None = None,
    recipe: str | None = None,
    seed: int | None = None,
    settings: dict[str, Any] | None = None,
) -> ExperimentConfig:
    """The experiment that a notebook's parameters stand for; None leaves a choice to the preset."""
    seeded = {} if seed is None else {"runtime.seed": seed}
    return configure(preset, recipe, samples, {**seeded, **(settings or {})}, print)


def comparison_counts(preset: str, samples: int | None) -> tuple[int, int]:
    """Samples of the two runs to compare: the larger count, and a fifth of it as in the published report.

    Raises:
        UserError: an unknown preset, or fewer samples than a fifth can be taken of.
    """
    if preset not in PRESETS:
        raise UserError(f"preset is {preset!r}; allowed: {', '.join(PRESETS)}.")
    larger = PRESETS[preset].samples[-1] if samples is None else samples
    if larger < COMPARED_RATIO:
        raise UserError(f"samples is {larger}; allowed for a comparison: {COMPARED_RATIO} or more.")
    return larger // COMPARED_RATIO, larger


def runs_root() -> Path:
    """Folder of all run folders: `$CTXKV_RUNS`, or `runs` at the top of the clone (on Colab, here)."""
    if root := os.environ.get(ROOT_VARIABLE):
        return Path(root)
    here = Path.cwd()
    return (here.parent if (here.parent / "ctxkv_lib").is_dir() else here) / "runs"
