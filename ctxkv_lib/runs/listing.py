"""`ctxkv list`: every run folder below a folder, with its state."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import expanded, read_json
from ..method.memory import MIB
from .configure import FITTED, stated_settings, stored_config
from .records import Records
from .run_folder import DEFAULT_ROOT, MODEL_MARK, RunFolder

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)  # raised by broken files


@dataclass(frozen=True)
class Listed:
    """One run folder.

    Attributes:
        kind: its preset and recipe; a dash if they cannot be read.
        settings: those that differ from the preset's and recipe's, without how a file was split.
        tokens: of the training stream; None if the run has no results yet.
        best_ppl: lowest validation PPL so far; None before the first epoch.
        state: "finished", "interrupted" or "damaged".
        mib: on disk.
    """

    path: Path
    kind: str
    settings: dict[str, Any]
    tokens: int | None
    best_ppl: float | None
    state: str
    mib: float


def list_runs(root: Path | str = DEFAULT_ROOT) -> list[Listed]:
    """Find every run folder at or below `root`; a broken one is listed as such.

    Raises:
        UserError: there is no such folder.
    """
    root = expanded(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name the one that holds your run folders.")
    folders = [root, *root.glob("*"), *root.glob("*/*")]  # a comparison may hold the folders of its runs
    return [_listed(RunFolder(path)) for path in sorted(folders) if _is_run(path)]


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    with suppress(PermissionError):  # of a folder such as lost+found
        is_model = (path / MODEL_MARK).exists()
        return not is_model and any(f.is_file() for f in (folder.config, folder.metrics_file, folder.summary))
    return False


def _listed(folder: RunFolder) -> Listed:
    mib = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file()) / MIB
    try:
        values = read_json(folder.config)
        kind = f"{values['preset']}, {values['recipe']}"
        config = stored_config(folder.path, values)
        fitted = FITTED if config.data.source == "file" else ()
        settings = {key: value for key, value in stated_settings(config).items() if key not in fitted}
        ppls = [line["val_ppl"] for line in folder.metric_lines() if line["stage"] == "phase2"]
        tokens, best, state = None, min(ppls, default=None), "interrupted"
        records = Records.read(folder.path) if folder.summary.exists() else None
        if folder.summary.exists() and (records is None or "results" in records.stages):
            summary = read_json(folder.summary)
            tokens, best = int(summary["train_tokens"]), float(summary["phase2"]["val_ppl"])
            state = _state(folder.path, records) if ppls else "damaged"
        return Listed(folder.path, kind, settings, tokens, best, state, mib)
    except UNREADABLE:
        return Listed(folder.path, "-", {}, None, None, "damaged", mib)


def _state(path: Path, records: Records | None) -> str:
    """Return the state of a run that has its results."""
    stages = records.stages.values() if records else ()
    files = {name: known for each in stages for name, known in each.files.items()}
    return "finished" if records and all((path / name).is_file() for name in files) else "damaged"
