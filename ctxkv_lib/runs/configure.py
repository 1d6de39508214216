"""The experiment that a preset, a recipe and settings stand for; with a file, sizes that fit it."""

from collections.abc import Callable
from typing import Any

from ..data.local_files import comparable_samples, describe_split, fitting_sizes
from ..progress import say
from .config import COMPARED_RATIO, PRESETS, ExperimentConfig, build_config


def configure(
    preset: str,
    recipe: str | None = None,
    samples: int | None = None,
    settings: dict[str, Any] | None = None,
    tell: Callable[[str], None] = say,
) -> ExperimentConfig:
    """`build_config`; where the settings name a file, sizes that are not asked for fit it.

    Args:
        tell: gets a line that says how the file is split, if any size was left open.

    Raises:
        UserError: as `build_config`; the file cannot be read, or is too small.
    """
    asked = {**(settings or {}), **({} if samples is None else {"data.samples": samples})}
    if asked.get("data.path") is not None:
        asked.setdefault("data.source", "file")
    config = build_config(preset, recipe, None, asked)
    if config.data.source != "file":
        return config
    names = {key.removeprefix("data.") for key in asked if key.startswith("data.")}
    sizes = fitting_sizes(config.data, names, config.model.context_window)
    config = config.replace({f"data.{name}": value for name, value in sizes.items()})
    if sizes:
        tell(describe_split(config.data))
    return config


def compared_samples(config: ExperimentConfig) -> tuple[int, ...]:
    """Choose the counts that `compare` takes: the preset's; of a file all, and a fifth if that is enough."""
    if config.data.source != "file":
        return PRESETS[config.preset].samples
    return comparable_samples(config.data, config.model.context_window, COMPARED_RATIO)
