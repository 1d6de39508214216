"""Whose a run folder is: an experiment's own, another one's, or nobody's."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DamagedFile, UserError
from ..files import read_json
from ..progress import notice
from .config import ExperimentConfig, build_config, config_from_dict
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


def own_records(folder: Path, config: ExperimentConfig) -> Records:
    """The records of `config`'s stages in `folder`; none if it is new, or if they cannot be trusted.

    Raises:
        UserError: the folder holds another experiment, or one that cannot be read.
    """
    fresh = Records(folder, config.to_dict())
    if _visible(folder) <= {CONFIG}:  # nothing has been computed
        return fresh
    try:
        records = Records.read(folder)
    except DamagedFile as error:
        notice(f"{error.path} cannot be used: {error.reason}; every stage is made again.")
        records = None
    else:
        if records is None and any(folder.glob("caches/*.safetensors")):
            notice(f"{folder} has no records of its stages, or an earlier version's: they are made again.")
    held = _held_config(folder, records)
    if held is None:
        raise UserError(
            f"The run in {folder} can no longer be read, not even its {CONFIG}; delete that folder, "
            "or name another with --out."
        )
    _refuse_other(folder, config, held)
    return records or fresh


def _held_config(folder: Path, records: Records | None) -> dict[str, Any] | None:
    if records:
        return records.config
    try:
        return read_json(folder / CONFIG)
    except (FileNotFoundError, DamagedFile):
        return None


def _refuse_other(folder: Path, config: ExperimentConfig, held: dict[str, Any]) -> None:
    ours = dict(flat(config.to_dict()))
    theirs = dict(flat(stored_config(folder, held).to_dict()))
    different = sorted(key for key in ours if ours[key] != theirs[key])
    if different:
        shown = ", ".join(f"{key} {theirs[key]!r} (asked: {ours[key]!r})" for key in different[:3])
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{folder} holds a run with another configuration: {shown}{more}; "
            "name another folder with --out, or delete that one."
        )


def stored_config(folder: Path, values: Any) -> ExperimentConfig:
    """The configuration that a run folder keeps; a setting that its version did not have takes its default.

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
    """The command line that makes or continues this run in `out`."""
    plain = dict(flat(build_config(config.preset, config.recipe, config.data.samples).to_dict()))
    words = ["ctxkv", "run", "--preset", config.preset, "--recipe", config.recipe]
    words += ["--samples", str(config.data.samples)]
    for key, value in flat(config.to_dict()):
        if value != plain[key] or (config.data.source == "file" and key in FITTED):
            words += ["--set", f"{key}={value}"]
    return shlex.join([*words, "--out", str(out)])


def changed_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a configuration, given as a dictionary, that are not its preset's and recipe's own."""
    plain = build_config(values["preset"], values["recipe"], values["data"]["samples"])
    usual = dict(flat(plain.to_dict()))
    return {key: value for key, value in flat(values) if "." in key and usual.get(key) != value}


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`("concern.field", value)` of a nested configuration."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
