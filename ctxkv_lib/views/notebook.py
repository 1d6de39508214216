"""Say where a notebook runs, and build the configuration from its form."""

import os
import sys
from typing import Any

import torch

from .. import __version__
from ..runs.config import ExperimentConfig
from ..runs.device import choose_device
from ..runs.presets import build_config


def session(minutes: str) -> str:
    """Return a line with version, device, default preset and expected time, for a notebook's first cell.

    If preset `colab` finds no GPU, a second line says how to get one.

    Args:
        minutes: how long the notebook takes with preset `offline` on 2 CPU cores, such as "1 to 3 minutes".
    """
    device, preset = choose_device("auto"), os.environ.get("CTXKV_PRESET", "").strip() or _default_preset()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    times = {"offline": f"{minutes} on 2 CPU cores", "ci": "a few seconds"}
    line = f"ctxkv_lib {__version__} on {name}, preset {preset}: {times.get(preset, 'not timed on a GPU')}"
    if preset == "colab" and device.type == "cpu":
        line += "\nNo GPU was found; choose one with Runtime > Change runtime type, and run this cell again."
    return line


def _default_preset() -> str:
    return "colab" if "google.colab" in sys.modules else "offline"


def notebook_config(
    preset: str = "",
    samples: Any = "",
    recipe: str = "",
    seed: Any = "",
    settings: dict[str, Any] | None = None,
) -> ExperimentConfig:
    """Build the configuration from a notebook's form. For an empty value, the preset's value is used.

    `$CTXKV_PRESET`, `$CTXKV_SAMPLES`, `$CTXKV_RECIPE` and `$CTXKV_SEED` override the form, and each
    change is printed. The default preset on Colab is `colab`. Elsewhere, it is `offline`, which needs no
    network. If you use your own data, it is read, and a message says how it is split.

    Args:
        settings: values of any other settings, such as `{"phase2.learning_rate": 5e-4}`.

    Raises:
        UserError: a value is not allowed.
    """
    form = {"preset": preset, "samples": samples, "recipe": recipe, "seed": seed}
    values = {}
    for name, given in form.items():
        text, variable = str("" if given is None else given).strip(), f"CTXKV_{name.upper()}"
        values[name] = os.environ.get(variable, "").strip() or text
        if text not in ("", values[name]):
            print(f"{name} is {values[name]} instead of {text}, because {variable} is set.")
    preset = values["preset"] or _default_preset()
    numbers = {"data.samples": values["samples"], "runtime.seed": values["seed"]}
    chosen = {name: text for name, text in numbers.items() if text} | (settings or {})
    return build_config(preset, values["recipe"] or None, None, chosen)
