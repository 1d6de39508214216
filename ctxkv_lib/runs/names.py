"""Names of runs, built from the settings in which the runs differ, and names of run folders."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import checksum, digest, expanded, runs_root
from ..plugins.hooks import HOOKS, PlugIn
from ..progress import format_count
from .config import ExperimentConfig, differing_settings
from .presets import RECIPES, changed_settings, with_fitting_sizes
from .summary import Run

# Maximum number of words in a run's name. If a name needs more words, runs are named after their folders.
MOST_NAMED = 3
# Up to this number of runs, tables have one column per run. With more runs, each run gets a row, so its name
# can be longer.
FEW_RUNS = 3


def run_folder_of(config: ExperimentConfig, root: Path | str | None = None) -> Path:
    """Return the default folder of an experiment. The same experiment always gets the same folder.

    The name is `preset-recipe-samples`, followed by plug-in names and, if any setting differs from the preset
    and recipe, a short hash of those settings. The user's own data file is hashed by content.

    Args:
        root: folder that holds the run folders. The default is `$CTXKV_RUNS`, or `runs`.
    """
    config = with_fitting_sizes(config)
    changed = changed_settings(config)
    if config.data.path is not None and expanded(config.data.path).is_file():
        changed["data.path"] = checksum(expanded(config.data.path))
    plugins = [plugin.name for hook, plugin in config.plugins.items() if f"{hook}.plugin" in changed]
    words = [config.preset, config.recipe, str(config.data.samples)]
    name = "-".join([*words, *map(_last_word, plugins)])
    folder = runs_root() if root is None else expanded(root)
    return folder / (f"{name}-{digest(changed)[:6]}" if changed else name)


def comparison_folder(configs: Sequence[ExperimentConfig], root: Path | str | None = None) -> Path:
    """Return the default folder of a comparison: the name of its largest run, and the other sample counts."""
    *smaller, largest = sorted(map(with_fitting_sizes, configs), key=lambda config: config.data.size("train"))
    counts = "-".join(str(config.data.samples) for config in smaller)
    return Path(f"{run_folder_of(largest, root)}-vs-{counts}")


def run_names(runs: Sequence[Run]) -> list[str]:
    """Name each run after the user's own parts and the settings that differ between the runs.

    If these names are too long or not unique, runs are named after their folders. Settings that differ only
    because the presets or recipes differ are left out.
    """
    configs = [run.config for run in runs]
    chosen = {"preset", "recipe", "data.samples"}.union(*map(changed_settings, configs))
    differing = [
        {key: value for key, value in settings.items() if key in chosen}
        for settings in differing_settings(configs)
    ]
    if len(runs) == 1:
        own = {f"{hook}.plugin": plugin.name for hook, plugin in _own_parts(configs[0]).items()}
        differing = [{"data.samples": configs[0].data.samples, **own}]
    words = [_words(config, row, configs) for config, row in zip(configs, differing, strict=True)]
    names = [", ".join(each) for each in words]
    if (
        (max(map(len, words)) <= MOST_NAMED or len(runs) > FEW_RUNS)
        and all(names)
        and len({*names}) == len(runs)
    ):
        return names
    folders = [run.path.name for run in runs]
    return folders if len({*folders}) == len(runs) else [str(run.path) for run in runs]


def variant_names(runs: Sequence[Run], bases: Sequence[Run]) -> list[str]:
    """Name each run by its differences from its base run.

    If the base runs have different numbers of conversations, each name includes the number for its run. If
    several runs get the same name, the name of the folder is added in brackets.
    """
    names = []
    sizes = {base.config.data.samples for base in bases}
    for run, base in zip(runs, bases, strict=True):
        (name,) = run_names([base, run])[1:]
        size = run.config.data.size("train")
        is_told = len(sizes) > 1 and size == base.config.data.samples
        names.append(f"{name}, {format_count(size)}" if is_told else name)
    folders = [run.path.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({folder})"
        for name, folder in zip(names, folders, strict=True)
    ]


def _own_parts(config: ExperimentConfig) -> dict[str, PlugIn]:
    """Return the plug-ins that are not part of the recipe, by hook."""
    usual = RECIPES[config.recipe]
    return {hook: plugin for hook, plugin in config.plugins.items() if plugin.name != usual.get(hook)}


def _words(
    config: ExperimentConfig, settings: Mapping[str, Any], configs: Sequence[ExperimentConfig]
) -> list[str]:
    """Return the words of a run's name, such as `["GRUBlock", "500 samples", "interval 20"]`.

    If the runs use different plug-ins, a run with the recipe's plug-ins is named after the recipe. A setting
    of a plug-in appears only if another experiment in `configs` uses that plug-in with a different value.
    """
    words = []
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        if key == "data.samples":
            words.append(format_count(value))
        elif key in ("preset", "recipe"):
            words.append(value)
        elif group not in HOOKS or (name != "plugin" and _is_chosen(config, group, name, configs)):
            words.append(f"{name} {value}")
    hooks = [hook for hook in HOOKS if f"{hook}.plugin" in settings]
    own = [_last_word(plugin.name) for hook, plugin in _own_parts(config).items() if hook in hooks]
    missing = [
        f"no {hook}" for hook in hooks if hook in RECIPES[config.recipe] and not config.plugins.get(hook)
    ]
    recipe = [config.recipe] if hooks and "recipe" not in settings else []
    return (own or missing or recipe) + words


def _is_chosen(config: ExperimentConfig, hook: str, name: str, configs: Sequence[ExperimentConfig]) -> bool:
    """Return whether another experiment uses the same plug-in with a different value of setting `name`."""
    parts = [part for each in configs if (part := each.plugins.get(hook))]
    part = config.plugins.get(hook)
    return any(
        part and part.name == other.name and part.settings.get(name) != other.settings.get(name)
        for other in parts
    )


def _last_word(plugin: str) -> str:
    """Return the name of a class or function without its module."""
    return str(re.findall(r"\w+", plugin)[-1])
