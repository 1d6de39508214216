"""Names for runs, made from what differs between them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import ExperimentConfig
from .ownership import flat
from .run_folder import Run

MOST_NAMED = 3  # settings in a name; runs that differ in more go by their folders


def differing_settings(configs: Sequence[ExperimentConfig]) -> list[dict[str, Any]]:
    """Of each experiment the settings, `{"data.samples": 500}`, that are not the same in all of them."""
    flat_configs = [dict(flat(config.to_dict())) for config in configs]
    first = flat_configs[0]
    keys = [key for key in first if any(settings[key] != first[key] for settings in flat_configs)]
    return [{key: settings[key] for key in keys} for settings in flat_configs]


def distinctions(configs: Sequence[ExperimentConfig]) -> list[str]:
    """What each experiment has of its own besides its data, in a few words: its recipe, or some settings."""
    differing = [
        {key: value for key, value in settings.items() if not key.startswith("data.")}
        for settings in differing_settings(configs)
    ]
    if "recipe" in differing[0]:
        return [config.recipe for config in configs]
    if len(differing[0]) > MOST_NAMED:
        return [""] * len(configs)
    return [", ".join(_words(key, value) for key, value in settings.items()) for settings in differing]


def run_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run, no two alike: the settings that differ, or the folder where these do not tell."""
    differing = differing_settings([run.config for run in runs])
    if len(runs) == 1:
        differing = [{"data.samples": runs[0].config.data.samples}]
    named = [", ".join(_words(key, value) for key, value in settings.items()) for settings in differing]
    if len(differing[0]) <= MOST_NAMED and len(set(named)) == len(runs):
        return named
    folders = [run.path.name for run in runs]
    return folders if len(set(folders)) == len(runs) else [str(run.path) for run in runs]


def run_folders(places: Path | str | Sequence[Path | str]) -> list[Path]:
    """The folders of runs that `places` name: run folders, or folders with finished runs in them."""
    folders: dict[Path, None] = {}
    for place in [places] if isinstance(places, Path | str) else places:
        inside = sorted(summary.parent for summary in Path(place).glob("*/summary.json"))
        own = not inside or (Path(place) / "summary.json").is_file()
        folders |= dict.fromkeys([Path(place)] if own else inside)
    return list(folders)


def _words(key: str, value: Any) -> str:
    name = key.rpartition(".")[2]
    return f"{value:,} {name}" if key == "data.samples" else f"{name} {value}"
