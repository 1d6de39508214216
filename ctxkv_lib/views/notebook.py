"""What notebooks share: their parameters, where runs live, and Google Drive."""

import os
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runs.config import COMPARED_RATIO, PRESETS, ExperimentConfig
from ..runs.configure import configure
from ..runs.run_folder import ROOT_VARIABLE
from .drive import kept_on_drive as kept_on_drive

Parameters = tuple[str, int | None, str | None, int | None]  # preset, samples, recipe, seed


def parameters(preset: Any, samples: Any, recipe: Any, seed: Any) -> Parameters:
    """What a notebook is run with: the values of its form, as text, where the environment has no others.

    `$CTXKV_PRESET`, `$CTXKV_SAMPLES`, `$CTXKV_RECIPE` and `$CTXKV_SEED` go before the form, with a line where
    that changes something. Empty (or None) is a preset that suits the machine, and None for the others, which
    leaves the choice to the preset.

    Raises:
        UserError: `samples` or `seed` is no whole number.
    """
    form = {"preset": preset, "samples": samples, "recipe": recipe, "seed": seed}
    texts = {name: "" if value is None else str(value).strip() for name, value in form.items()}
    values = {name: _from_environment(name, text) for name, text in texts.items()}
    numbers = {name: _whole_number(name, values[name]) for name in ("samples", "seed")}
    return values["preset"] or default_preset(), numbers["samples"], values["recipe"] or None, numbers["seed"]


def _from_environment(name: str, in_form: str) -> str:
    variable = f"CTXKV_{name.upper()}"
    value = os.environ.get(variable, "").strip() or in_form
    if in_form not in ("", value):
        print(f"{name} is {value}, as {variable} says, and not {in_form}.")
    return value


def _whole_number(name: str, value: str) -> int | None:
    try:
        return int(value) if value else None
    except ValueError:
        raise UserError(f"{name} is {value!r}; allowed: a whole number, or nothing.") from None


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
