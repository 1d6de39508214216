"""Whose a run folder is: an experiment's own, another one's, or no run's."""

import shlex
from pathlib import Path
from typing import Any

from ..errors import DamagedFile, UserError
from ..files import read_json
from ..progress import notice
from .config import ExperimentConfig, build_config, config_from_dict, flat
from .plugins import HOOKS, code_key
from .records import FILE, Records

CONFIG = "config.json"
FITTED = {"data.validation_samples", "data.test_samples"}  # to a file, unless they are given
FOREIGN = {"desktop.ini", "Thumbs.db"}  # what systems leave anywhere; hidden files do not count either


def refuse_foreign(folder: Path) -> None:
    """Raise a UserError if a folder holds something that is no run; nothing is written to such a one."""
    if _visible(folder) and not any((folder / name).is_file() for name in (CONFIG, FILE)):
        raise UserError(f"{folder} is not empty and holds no run; name another folder with --out.")


def _visible(folder: Path) -> set[str]:
    if not folder.exists():
        return set()
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} - FOREIGN


def own_records(folder: Path, config: ExperimentConfig, again: bool = False) -> Records:
    """Return the records of `config`'s stages in `folder`; none if it is new, or if they cannot be trusted.

    Args:
        again: make a finished result anew that other code made.

    Raises:
        UserError: the folder holds another experiment, one that cannot be read, or a finished result of
            other code.
    """
    code = code_key(*config.plugins.values())
    fresh = Records(folder, config.to_dict(), code)
    if _visible(folder) <= {CONFIG}:  # nothing has been computed
        return fresh
    try:
        records = Records.read(folder)
    except DamagedFile as error:
        notice(f"{error.path} cannot be used: {error.reason}; every stage is made again.")
        records = None
    held = records.config if records else _written_config(folder)
    if held is None:
        raise UserError(
            f"The run in {folder} can no longer be read, not even its {CONFIG}; delete that folder, "
            "or name another with --out."
        )
    _refuse_other(folder, config, held)
    if records and "results" in records.stages and records.code != code and not again:
        raise UserError(
            f"{folder} holds a finished result of other code, which is kept; name another folder "
            "with --out, or make it anew with --again."
        )
    if records:
        records.code = code
    return records or fresh


def _written_config(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / CONFIG)
    except (FileNotFoundError, DamagedFile):
        return None


def _refuse_other(folder: Path, config: ExperimentConfig, held: dict[str, Any]) -> None:
    ours, theirs = (dict(flat(each.to_dict())) for each in (config, stored_config(folder, held)))
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if different:
        shown = ", ".join(f"{key} {theirs.get(key)!r} (asked: {ours.get(key)!r})" for key in different[:3])
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{folder} holds a run with another configuration: {shown}{more}; "
            "name another folder with --out, or delete that one."
        )


def stored_config(folder: Path, values: Any) -> ExperimentConfig:
    """Return the configuration that a run folder keeps.

    Raises:
        UserError: it has settings that this version does not know or allow, or is none.
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
            f"{folder / CONFIG} holds no configuration; name another folder with --out, or delete that one."
        ) from None


def run_command(config: ExperimentConfig, out: Path) -> str:
    """Return the command line that makes or continues this run in `out`."""
    plain = dict(flat(build_config(config.preset, config.recipe, config.data.samples).to_dict()))
    words = ["ctxkv", "run", "--preset", config.preset, "--recipe", config.recipe]
    words += ["--samples", str(config.data.samples)]
    for key, value in flat(config.to_dict()):
        hook, _, name = key.partition(".")
        if (
            value == plain.get(key) and not (config.data.source == "file" and key in FITTED)
        ) or name == "source":
            continue
        words += [f"--{hook}", value] if hook in HOOKS and name == "plugin" else ["--set", f"{key}={value}"]
    return shlex.join([*words, "--out", str(out)])
