"""Names for runs, made from what differs between them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..progress import counted
from .config import ExperimentConfig, flat
from .plugins import HOOKS
from .run_folder import Run

MOST_NAMED = 3  # settings in a name; runs that differ in more go by their folders


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


def distinctions(configs: Sequence[ExperimentConfig]) -> list[str]:
    """Describe how each experiment differs besides its data: by recipe, or by a few settings."""
    differing = _besides_data(configs)
    if "recipe" in differing[0]:
        return [config.recipe for config in configs]
    return [_in_words(settings) if len(settings) <= MOST_NAMED else "" for settings in differing]


def settings_differ(configs: Sequence[ExperimentConfig]) -> bool:
    """Return whether experiments differ in more than their data, and where they run."""
    return any(key != "preset" and not key.startswith("runtime.") for key in _besides_data(configs)[0])


def _besides_data(configs: Sequence[ExperimentConfig]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in settings.items() if not key.startswith("data.")}
        for settings in differing_settings(configs)
    ]


def run_names(runs: Sequence[Run]) -> list[str]:
    """Name each run by the settings that differ, or by its folder if these are many or none."""
    differing = differing_settings([run.config for run in runs])
    if len(runs) == 1:
        differing = [{"data.samples": runs[0].config.data.samples}]
    by_settings = [_in_words(settings) for settings in differing]
    folders = [run.path.name for run in runs]
    for names in ([by_settings] if len(differing[0]) <= MOST_NAMED else []) + [folders]:
        if len(set(names)) == len(runs):
            return names
    return [str(run.path) for run in runs]


def run_folders(places: Path | str | Sequence[Path | str]) -> list[Path]:
    """Return the run folders that `places` name: run folders, or folders with finished runs in them."""
    folders: dict[Path, None] = {}
    for place in map(Path, [places] if isinstance(places, Path | str) else places):
        inside = sorted(summary.parent for summary in place.glob("*/summary.json"))
        is_run = not inside or (place / "summary.json").is_file()
        folders |= dict.fromkeys([place] if is_run else inside)
    return list(folders)


def _in_words(settings: dict[str, Any]) -> str:
    """Return settings as "500 samples, interval 20"; of plug-ins, their names."""
    words = []
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        if group not in HOOKS:
            words.append(counted(value) if key == "data.samples" else f"{name} {value}")
        elif name == "plugin" and value:
            words.append(f"{group} {value.rpartition(':')[2]}")
    return ", ".join(words) or ("no plug-in" if settings else "")
