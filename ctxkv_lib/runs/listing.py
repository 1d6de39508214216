"""`ctxkv list`: every run folder below a folder, with its state; and names for runs, of what differs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import expanded
from ..method.memory import MIB
from .config import config_from_dict
from .folder import DEFAULT_ROOT, RECORD, RunFolder
from .presets import changed_settings


@dataclass(frozen=True)
class Listed:
    """One run folder.

    Attributes:
        kind: its preset and recipe; a dash if they cannot be read.
        settings: those that differ from the preset's and recipe's.
        tokens: of the training stream; None before Phase 1 has finished.
        best_ppl: lowest validation PPL; None before Phase 2 has finished.
        state: "finished", "interrupted" or "damaged" (a file is missing, or the record cannot be read).
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
    depths = ("", "*/", "*/*/")  # a comparison may hold the folders of its runs
    records = {record for depth in depths for record in root.glob(f"{depth}{RECORD}")}
    return [_listed(record.parents[1]) for record in sorted(records)]


def _listed(path: Path) -> Listed:
    mib = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / MIB
    try:
        folder = RunFolder.read(path)
    except (UserError, OSError):
        return Listed(path, "-", {}, None, None, "damaged", mib)
    config, stages = config_from_dict(folder.config), folder.stages
    ppls = [line["val_ppl"] for line in stages["phase2"].metrics] if "phase2" in stages else []
    tokens = stages["caches"].result["tokens"]["train"] if "caches" in stages else None
    is_whole = all((path / file).is_file() for stage in stages.values() for file in stage.files)
    state = "damaged" if not is_whole else "finished" if "results" in stages else "interrupted"
    settings = {key: value for key, value in changed_settings(config).items() if key != "data.source"}
    kind = f"{config.preset}, {config.recipe}"
    return Listed(path, kind, settings, tokens, min(ppls, default=None), state, mib)
