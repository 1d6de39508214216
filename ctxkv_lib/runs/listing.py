"""`ctxkv list`: the run folders below a folder, in whatever state they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json
from .ownership import FITTED, changed_settings
from .records import DROPPED, Records
from .run_folder import MODEL_MARK, RunFolder

MIB = 2**20
IMPLIED = {"data.source"}  # by data.path
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)  # what a broken file can lead to


@dataclass(frozen=True)
class Listed:
    """One run folder.

    Attributes:
        kind: its preset and recipe; a dash if they cannot be read.
        settings: those that are not the preset's and recipe's own, nor how a file was split.
        tokens: of the training stream; None if it was not made yet.
        best_ppl: lowest validation PPL so far; None before the first epoch.
        state: "finished", "results only" (model and caches were dropped), "interrupted" or "damaged".
        mib: on disk.
    """

    path: Path
    kind: str
    settings: dict[str, Any]
    tokens: int | None
    best_ppl: float | None
    state: str
    mib: float


def list_runs(root: Path) -> list[Listed]:
    """Every run folder at or below `root`; a broken one is listed as such.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name the one that holds your run folders.")
    folders = [root, *root.glob("*"), *root.glob("*/*")]  # a comparison may hold the folders of its runs
    return [_listed(RunFolder(path)) for path in sorted(folders) if _is_run(path)]


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    is_model = (path / MODEL_MARK).exists()
    return not is_model and any(f.is_file() for f in (folder.config, folder.metrics_file, folder.summary))


def _listed(folder: RunFolder) -> Listed:
    size = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file()) / MIB
    try:
        values = read_json(folder.config)
        kind = f"{values['preset']}, {values['recipe']}"
        changed = changed_settings(values)
        settings = {key: value for key, value in changed.items() if key not in FITTED | IMPLIED}
        ppls = [line["val_ppl"] for line in folder.metric_lines() if line["stage"] == "phase2"]
        if not folder.summary.exists():
            return Listed(folder.path, kind, settings, None, min(ppls, default=None), "interrupted", size)
        summary = read_json(folder.summary)
        tokens, best = int(summary["train_tokens"]), float(summary["phase2"]["val_ppl"])
        return Listed(folder.path, kind, settings, tokens, best, _state(folder) if ppls else "damaged", size)
    except UNREADABLE:
        return Listed(folder.path, "-", {}, None, None, "damaged", size)


def _state(folder: RunFolder) -> str:
    """Of a run that has its results."""
    if (folder.model / "model.safetensors").is_file():
        return "finished"
    records = Records.read(folder.path)
    dropped = records and DROPPED in records.stages["model"].files.values()
    return "results only" if dropped else "damaged"


def format_runs(runs: list[Listed]) -> str:
    """`list_runs` as a table for a terminal; settings stand last, since they can be many."""
    names = ["Run", "State", "Preset, recipe", "Tokens", "Best PPL", "MiB", "Settings that differ from these"]
    rows = [names, *(list(_cells(run)) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join(
        "  ".join(f"{row[i]:<{widths[i]}}" for i in (0, 1, 2))
        + "".join(f"  {row[i]:>{widths[i]}}" for i in (3, 4, 5))
        + f"  {row[6]}".rstrip()
        for row in rows
    )


def _cells(run: Listed) -> Iterator[str]:
    yield str(run.path)
    yield run.state
    yield run.kind
    yield "-" if run.tokens is None else f"{run.tokens:,}"
    yield "-" if run.best_ppl is None else f"{run.best_ppl:,.1f}"
    yield f"{run.mib:,.0f}"
    yield ", ".join(f"{key}={value}" for key, value in run.settings.items())
