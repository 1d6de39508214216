"""Build the configuration from a notebook's form."""

import os
import sys
from typing import Any

from ..runs.config import ExperimentConfig
from ..runs.presets import build_config, with_fitting_sizes


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
    preset = values["preset"] or ("colab" if "google.colab" in sys.modules else "offline")
    numbers = {"data.samples": values["samples"], "runtime.seed": values["seed"]}
    chosen = {name: text for name, text in numbers.items() if text} | (settings or {})
    return with_fitting_sizes(build_config(preset, values["recipe"] or None, None, chosen))
