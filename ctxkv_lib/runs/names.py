"""Names of runs, of what differs, and of their folders."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import checksum, digest, expanded, runs_root
from ..plugins.hooks import HOOKS
from ..progress import format_count
from .config import ExperimentConfig, differing_settings
from .presets import changed_settings, with_fitting_sizes
from .summary import Run

MOST_NAMED = 3  # settings in a name; a few runs that differ in more go by their folders
FEW_RUNS = 3  # which are compared column by column; of more, each has a row, where long names fit


def run_folder_of(config: ExperimentConfig, root: Path | str | None = None) -> Path:
    """Return the default folder of an experiment; the same experiment always gets the same one.

    `preset-recipe-samples`, with the names of plug-ins and a short hash behind it of the settings that are
    not those of preset and recipe, if any. The user's own file counts by its content.

    Args:
        root: folder of the run folders; None takes `$CTXKV_RUNS`, or `runs`.
    """
    config = with_fitting_sizes(config)
    changed = changed_settings(config)
    if config.data.path is not None and expanded(config.data.path).is_file():
        changed["data.path"] = checksum(expanded(config.data.path))
    plugins = [plugin.name for hook, plugin in config.plugins.items() if f"{hook}.plugin" in changed]
    words = [config.preset, config.recipe, str(config.data.samples)]
    name = "-".join(words + [re.findall(r"\w+", plugin)[-1] for plugin in plugins])
    folder = runs_root() if root is None else expanded(root)
    return folder / (f"{name}-{digest(changed)[:6]}" if changed else name)


def comparison_folder(configs: Sequence[ExperimentConfig], root: Path | str | None = None) -> Path:
    """Return the default folder of a comparison: its largest run's name and the smaller counts."""
    *smaller, largest = sorted(map(with_fitting_sizes, configs), key=lambda config: config.data.size("train"))
    counts = "-".join(str(config.data.samples) for config in smaller)
    return Path(f"{run_folder_of(largest, root)}-vs-{counts}")


def run_names(runs: Sequence[Run]) -> list[str]:
    """Name each run by the settings that differ, or by its folder.

    Settings that differ only as preset and recipe do are left out.
    """
    configs = [run.config for run in runs]
    chosen = {"preset", "recipe", "data.samples"}.union(*map(changed_settings, configs))
    differing = [
        {key: value for key, value in settings.items() if key in chosen}
        for settings in differing_settings(configs)
    ]
    if len(runs) == 1:
        differing = [{"data.samples": runs[0].config.data.samples}]
    names = [_in_words(settings) for settings in differing]
    if (len(differing[0]) <= MOST_NAMED or len(runs) > FEW_RUNS) and len({*names}) == len(runs):
        return names
    folders = [run.path.name for run in runs]
    return folders if len({*folders}) == len(runs) else [str(run.path) for run in runs]


def _in_words(settings: dict[str, Any]) -> str:
    """Return settings as "500 samples, interval 20"; of plug-ins, their names."""
    words = []
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        if key == "data.samples":
            words.append(format_count(value))
        elif group in HOOKS and name == "plugin":
            words.append(f"{group} {str(value).rpartition(':')[2]}")
        else:
            words.append(f"{name} {value}")
    return ", ".join(words)
