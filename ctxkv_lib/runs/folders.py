"""The default folders of runs and comparisons, which are named after their settings."""

from collections.abc import Sequence
from pathlib import Path

from ..files import checksum, digest, expanded, runs_root
from ..plugins.plugins import short_name
from .config import ExperimentConfig
from .presets import changed_settings


def run_folder_of(config: ExperimentConfig, root: Path | str | None = None) -> Path:
    """Return the default folder of an experiment. The same experiment always gets the same folder.

    The name is `preset-recipe-samples`, followed by plug-in names and, if any setting differs from the preset
    and recipe, a short hash of those settings. The user's own data file is hashed by content.

    Args:
        root: folder that contains the run folders. The default is `$CTXKV_RUNS`, or `runs`.
    """
    changed = changed_settings(config)
    if config.data.path is not None and expanded(config.data.path).is_file():
        changed["data.path"] = checksum(expanded(config.data.path))
    plugins = [plugin.name for kind, plugin in config.plugins.items() if f"{kind}.plugin" in changed]
    words = [config.preset, config.recipe, str(config.data.samples), *map(short_name, plugins)]
    folder, name = runs_root() if root is None else expanded(root), "-".join(words)
    return folder / (f"{name}-{digest(changed)[:6]}" if changed else name)


def comparison_folder(configs: Sequence[ExperimentConfig], root: Path | str | None = None) -> Path:
    """Return the default folder of a comparison: the name of its largest run, and the other sample counts."""
    *smaller, largest = sorted(configs, key=lambda config: config.data.samples)
    counts = "-".join(str(config.data.samples) for config in smaller)
    return Path(f"{run_folder_of(largest, root)}-vs-{counts}")
