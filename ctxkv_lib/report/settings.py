"""List settings for `ctxkv settings`, from their dataclasses, presets and recipes."""

import dataclasses
from itertools import groupby
from typing import Any

from ..runs.config import GROUPS, PRESETS, RECIPES, build_config, recipe_settings

WIDTH = 44  # of the column of names and values


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


def format_settings(rows: list[dict[str, Any]]) -> str:
    """Format `describe_settings` for a terminal."""
    lines = []
    for concern, group in groupby(rows, lambda row: row["setting"].partition(".")[0]):
        lines += ["", f"{concern}: {(GROUPS[concern].__doc__ or '').partition('.')[0]}"]
        for row in group:
            value = f"{row['setting']} = {row['value']} {row['unit']}".rstrip()
            lines.append(f"  {value:<{WIDTH}}  {row['reason']}")
            lines += [f"  {'':<{WIDTH}}  {line}" for line in _details(row)]
    return "\n".join(lines[1:])


def _details(row: dict[str, Any]) -> list[str]:
    allowed = [f"allowed: {row['allowed']}"] if row["allowed"] != "any" else []
    meanings = [f"  {name}: {meaning}" for name, meaning in row["meanings"].items() if meaning]
    others = ", ".join(f"{name}: {value}" for name, value in row["elsewhere"].items())
    return [*allowed, *meanings, *([f"with {others}"] if others else [])]
