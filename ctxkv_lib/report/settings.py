"""List settings for `ctxkv settings`, from their dataclasses, presets and recipes."""

import dataclasses
from typing import Any

from ..runs.config import GROUPS, PRESETS, RECIPES, build_config, recipe_settings


def describe_settings(preset: str | None = None) -> list[dict[str, Any]]:
    """List every setting, concern by concern.

    Args:
        preset: whose values to give; None gives the defaults.

    Returns:
        rows of `setting` (its key), `value`, `unit`, `reason`, `allowed`, `meanings` (of names that are
        allowed), and `elsewhere` (`{preset or recipe: value}` where one of them has another).

    Raises:
        UserError: an unknown preset.
    """
    chosen = build_config(preset) if preset else None
    layers = {name: {**each.settings, "data.samples": each.samples} for name, each in PRESETS.items()}
    layers |= {f"recipe {name}": recipe_settings(name) for name in RECIPES}
    rows = []
    for concern, settings in GROUPS.items():
        for known in dataclasses.fields(settings):
            key = f"{concern}.{known.name}"
            value = getattr(getattr(chosen, concern), known.name) if chosen else known.default
            others = {name: layer[key] for name, layer in layers.items() if layer.get(key, value) != value}
            about = {**known.metadata, "allowed": known.metadata["allowed"].text}
            rows.append({"setting": key, "value": value, **about, "elsewhere": others})
    return rows
