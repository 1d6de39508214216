"""Names for runs, made from what differs between them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import expanded
from ..progress import counted
from .config import ExperimentConfig
from .configure import differing_settings, short_names
from .plugins import HOOKS
from .run_folder import Run

MOST_NAMED = 3  # settings in a name; runs that differ in more go by their folders


def distinctions(configs: Sequence[ExperimentConfig]) -> list[str]:
    """Describe how each experiment differs besides its data: by recipe, or by a few settings."""
    differing = [
        {key: value for key, value in settings.items() if not key.startswith("data.")}
        for settings in differing_settings(configs)
    ]
    if "recipe" in differing[0]:
        return [config.recipe for config in configs]
    return [_in_words(settings) if len(settings) <= MOST_NAMED else "" for settings in differing]


def settings_differ(configs: Sequence[ExperimentConfig]) -> bool:
    """Return whether experiments differ in more than their data, and where they run."""
    differing, *_ = differing_settings(configs)
    return any(key != "preset" and not key.startswith(("data.", "runtime.")) for key in differing)


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
    for given in [places] if isinstance(places, Path | str | Run) else places:
        place = expanded(given)
        inside = sorted(summary.parent for summary in place.glob("*/summary.json"))
        is_run = not inside or (place / "summary.json").is_file()
        folders |= dict.fromkeys([place] if is_run else inside)
    return list(folders)


def _in_words(settings: dict[str, Any]) -> str:
    """Return settings as "500 samples, interval 20"; of plug-ins, their names."""
    words = []
    for short, (key, value) in zip(short_names(settings), settings.items(), strict=True):
        group, _, name = key.rpartition(".")
        if group not in HOOKS:
            words.append(counted(value) if key == "data.samples" else f"{short} {value}")
        elif name == "plugin" and value:
            words.append(f"{group} {value.rpartition(':')[2]}")
    return ", ".join(words) or ("no plug-in" if settings else "")
