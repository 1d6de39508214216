"""Turn command-line words into a configuration, and a configuration into the command for it."""

import json
import os
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ..data.conversations import comparable_samples, describe_split, fitting_sizes
from ..errors import UserError
from ..progress import say
from .config import COMPARED_RATIO, ExperimentConfig, build_config, changed_settings, config_from_dict, flat
from .plugins import HOOKS, WITH_CONTEXTS

FITTED = ("data.validation_samples", "data.test_samples")  # to a file, unless they are given


def configure(
    preset: str,
    recipe: str | None = None,
    samples: int | None = None,
    settings: dict[str, Any] | None = None,
    tell: Callable[[str], None] = say,
) -> ExperimentConfig:
    """Build a configuration as `build_config` does, with split sizes that fit the user's own file.

    Args:
        tell: called with a line on how the file is split, if any size was left open.

    Raises:
        UserError: as `build_config`; the file cannot be read, or is too small.
    """
    asked = dict(settings or {})
    if samples is not None:
        once(asked, "data.samples", "samples")
        asked["data.samples"] = samples
    source = asked.get("data.source", "file")
    if asked.get("data.path") is not None and source != "file":
        raise UserError(
            f"data.source is {source!r} and data.path is {asked['data.path']!r}; give one of them."
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


def once(settings: Collection[str], key: str, option: str) -> None:
    """Refuse a setting that is also given by an option of its own."""
    if key in settings:
        raise UserError(f"{key} and {option} are both given; give one of them.")


def compared_samples(config: ExperimentConfig) -> tuple[int, int]:
    """Choose the sample counts of a comparison: a fifth of `data.samples`, as published, and all of them.

    Of the user's own file, the smaller count is larger if a fifth has too little text.

    Raises:
        UserError: too few samples for a fifth.
    """
    if config.data.source == "file":
        return comparable_samples(config.data, config.model.context_window, COMPARED_RATIO)
    larger = config.data.samples
    if larger < COMPARED_RATIO:
        raise UserError(f"samples is {larger}; allowed for a comparison: {COMPARED_RATIO} or more.")
    return larger // COMPARED_RATIO, larger


def stored_config(folder: Path, values: Any) -> ExperimentConfig:
    """Read the configuration in a run folder.

    Raises:
        UserError: it has unknown or refused settings, or is no configuration.
    """
    try:
        return config_from_dict(values)
    except UserError as error:
        raise UserError(
            f"{folder} holds a run of another version of ctxkv_lib ({str(error).rstrip('.')}); "
            "use that version, or another folder."
        ) from None
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{folder} has a config.json without a configuration; name another folder with --out, or delete "
            "that one."
        ) from None


def run_command(config: ExperimentConfig, out: Path) -> str:
    """Return the command line that makes or continues this run in `out`."""
    settings = stated_settings(config)
    if config.data.source == "file":
        chosen = (*FITTED, "data.corpus")
        settings |= {key: getattr(config.data, key.removeprefix("data.")) for key in chosen}
        here = os.path.abspath(os.path.expanduser(str(config.data.path)))
        settings |= {"data.path": here} if os.path.exists(here) else {}  # since it is named from elsewhere
    words = ["ctxkv", "run", "--preset", config.preset, "--recipe", config.recipe]
    words += ["--samples", str(config.data.samples)]
    for key, value in settings.items():
        text = json.dumps(value) if isinstance(value, list | dict) else value
        words += ["--set", f"{key.removesuffix('.plugin')}={text}"]
    folder = f"./{out}" if str(out).startswith("-") else str(out)  # else it would be read as an option
    return shlex.join([*words, "--out", folder])


def stated_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return `changed_settings` without those that a path or a plug-in implies."""
    implied = {f"{hook}.source" for hook in HOOKS} | ({"data.source"} if config.data.path else set())
    implied |= {f"{hook}.plugin" for hook in WITH_CONTEXTS} if config.plugins.get("mixer") else set()
    return {key: value for key, value in changed_settings(config).items() if key not in implied}


def short_names(keys: Collection[str]) -> list[str]:
    """Return settings' names without their groups, but for those that would then be alike."""
    names = [key.rpartition(".")[2] for key in keys]
    return [key if names.count(name) > 1 else name for key, name in zip(keys, names, strict=True)]


def differing_settings(configs: Sequence[ExperimentConfig]) -> list[dict[str, Any]]:
    """Return each experiment's settings, as `{"data.samples": 500}`, that are not the same in all of them.

    The digest of a plug-in's source is left out, as nobody can interpret it.
    """
    sources = {f"{hook}.source" for hook in HOOKS}
    all_settings = [
        {key: value for key, value in flat(config.to_dict()) if key not in sources} for config in configs
    ]
    first, every = all_settings[0], dict.fromkeys(key for settings in all_settings for key in settings)
    keys = [key for key in every if any(settings.get(key) != first.get(key) for settings in all_settings)]
    return [{key: settings.get(key) for key in keys} for settings in all_settings]
