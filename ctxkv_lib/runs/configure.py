"""A configuration as the command line and notebooks build it: sizes fit the user's own conversations."""

from collections.abc import Callable
from typing import Any

from ..data.conversations import comparable_samples, describe_split, fitting_sizes
from ..errors import UserError
from ..progress import say
from .config import ExperimentConfig, build_config

COMPARED_RATIO = 5  # the published report compares 500 conversations with 100


def configure(
    preset: str,
    recipe: str | None = None,
    samples: int | None = None,
    settings: dict[str, Any] | None = None,
    tell: Callable[[str], None] = say,
) -> ExperimentConfig:
    """Build a configuration as `build_config` does, with split sizes that fit the user's own conversations.

    Args:
        tell: called with a line on how they are split, if any size was left open.

    Raises:
        UserError: as `build_config`; the conversations cannot be read, or are too few.
    """
    asked = dict(settings or {})
    if samples is not None:
        asked["data.samples"] = samples
    if asked.get("data.path") is not None and asked.get("data.source", "file") != "file":
        raise UserError(
            f"data.source is {asked['data.source']!r} and data.path is given; leave one of them out."
        )
    config = build_config(preset, recipe, None, asked)
    if config.data.source != "file":
        return config
    names = {key.removeprefix("data.") for key in asked if key.startswith("data.")}
    sizes = fitting_sizes(config.data, names, config.model.context_window)
    config = config.replace({f"data.{name}": value for name, value in sizes.items()})
    if sizes:
        tell(describe_split(config.data))
    return config


def compared_samples(config: ExperimentConfig) -> tuple[int, int]:
    """Choose the sample counts of a comparison: a fifth of `data.samples`, as published, and all of them.

    Of the user's own conversations, the smaller count is larger if a fifth has too little text.

    Raises:
        UserError: too few samples for a fifth.
    """
    if config.data.source == "file":
        return comparable_samples(config.data, config.model.context_window, COMPARED_RATIO)
    larger = config.data.samples
    if larger < COMPARED_RATIO:
        raise UserError(f"samples is {larger}; allowed for a comparison: {COMPARED_RATIO} or more.")
    return larger // COMPARED_RATIO, larger
