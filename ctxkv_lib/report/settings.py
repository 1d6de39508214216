"""List settings for `ctxkv settings`, from their dataclasses, presets and recipes."""

import dataclasses
from typing import Any

from ..runs.config import GROUPS, PRESETS, RECIPES, build_config, flat
from ..runs.plugins import load, settings_class


def describe_settings(preset: str | None = None, recipe: str | None = None) -> list[dict[str, Any]]:
    """List every setting, concern by concern.

    Args:
        preset: whose values to give; None gives the defaults, or with a recipe those of `colab`.
        recipe: whose values to give, with the settings of its plug-ins; None takes the preset's own.

    Returns:
        rows of `setting` (its key), `value`, `unit`, `reason`, `allowed`, `meanings` (of names that are
        allowed), and `elsewhere` (`{preset or recipe: value}` where one of them has another).

    Raises:
        UserError: an unknown preset or recipe.
    """
    chosen = build_config(preset or "colab", recipe) if preset or recipe else None
    values = dict(flat(chosen.to_dict())) if chosen else {}
    plugins = chosen.plugins if chosen else {}
    groups = {**GROUPS, **{hook: settings_class(load(each.name)) for hook, each in plugins.items()}}
    if chosen:
        layers = {name: dict(flat(build_config(name, chosen.recipe).to_dict())) for name in PRESETS}
    else:
        layers = {name: {**each.settings, "data.samples": each.samples} for name, each in PRESETS.items()}
    layers |= {f"recipe {name}": RECIPES[name] for name in RECIPES}
    rows = []
    for concern, settings in groups.items():
        for known in dataclasses.fields(settings) if settings else ():
            key = f"{concern}.{known.name}"
            value = values.get(key, known.default)
            others = {name: layer[key] for name, layer in layers.items() if layer.get(key, value) != value}
            about = {**known.metadata, "allowed": known.metadata["allowed"].text}
            rows.append({"setting": key, "value": value, **about, "elsewhere": others})
    return rows
