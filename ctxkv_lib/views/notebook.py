"""What notebooks share: parameters from the environment, where runs live, and Google Drive."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import COMPARED_RATIO, PRESETS, ExperimentConfig
from ..data.local_files import configure
from ..errors import UserError
from ..files import replacing
from ..runs.run_folder import ROOT_VARIABLE

DRIVE_VARIABLE = "CTXKV_DRIVE"
PARAMETERS = {"preset": str, "samples": int, "recipe": str, "seed": int}


def parameter(name: str) -> Any:
    """A notebook's parameter: `$CTXKV_PRESET`, `$CTXKV_SAMPLES`, `$CTXKV_RECIPE` or `$CTXKV_SEED`.

    Returns:
        the variable's value; without it, a preset that suits the machine, and None for the others, which
        leaves the choice to the preset.

    Raises:
        UserError: an unknown parameter, or a value of the wrong type.
    """
    if name not in PARAMETERS:
        raise UserError(f"parameter is {name!r}; allowed: {', '.join(PARAMETERS)}.")
    variable = f"CTXKV_{name.upper()}"
    value = os.environ.get(variable)
    if not value:
        return default_preset() if name == "preset" else None
    try:
        return PARAMETERS[name](value)
    except ValueError:
        raise UserError(f"{variable} is {value!r}; allowed: a whole number.") from None


def default_preset() -> str:
    """`colab` on Colab, where the Hub is near; `offline` elsewhere, which needs no network."""
    return "colab" if "google.colab" in sys.modules else "offline"


def notebook_config(
    preset: str,
    samples: int | None = None,
    recipe: str | None = None,
    seed: int | None = None,
    settings: dict[str, Any] | None = None,
) -> ExperimentConfig:
    """The experiment that a notebook's parameters stand for; None leaves a choice to the preset."""
    seeded = {} if seed is None else {"runtime.seed": seed}
    return configure(preset, recipe, samples, {**seeded, **(settings or {})}, print)


def comparison_counts(preset: str, samples: int | None) -> tuple[int, int]:
    """Samples of the two runs to compare: the larger count, and a fifth of it as in the published report."""
    larger = PRESETS[preset].samples[-1] if samples is None else samples
    if larger < COMPARED_RATIO:
        raise UserError(f"samples is {larger}; allowed for a comparison: {COMPARED_RATIO} or more.")
    return larger // COMPARED_RATIO, larger


def runs_root() -> Path:
    """Folder of all run folders: `$CTXKV_RUNS`, or `runs` at the top of the clone (on Colab, here)."""
    if root := os.environ.get(ROOT_VARIABLE):
        return Path(root)
    here = Path.cwd()
    return (here.parent if (here.parent / "ctxkv_lib").is_dir() else here) / "runs"


@contextmanager
def kept_on_drive(*folders: Path) -> Iterator[None]:
    """Bring run folders back from Google Drive before the block, and save them there after it.

    Drive is slow with many small files, so a run is one archive there, and training works on the local disk.
    An interrupted block saves as well. Does nothing unless `$CTXKV_DRIVE` names a folder.
    """
    if not os.environ.get(DRIVE_VARIABLE):
        yield
        return
    drive = Path(os.environ[DRIVE_VARIABLE])
    for folder in folders:
        archive = drive / f"{folder.name}.tar"
        if archive.is_file() and not folder.exists():
            shutil.unpack_archive(archive, folder.parent, filter="data")
    try:
        yield
    finally:
        for folder in folders:
            if folder.is_dir():
                _save(folder, drive / f"{folder.name}.tar")


def _save(folder: Path, archive: Path) -> None:
    with replacing(archive) as beside:
        made = shutil.make_archive(str(beside), "tar", folder.parent, folder.name)
        os.replace(made, beside)
