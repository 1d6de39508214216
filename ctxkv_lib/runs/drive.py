"""Keep copies of run folders in Google Drive, since Colab deletes the files of a machine after each session.

Each finished stage has its own archive. The archive is written once, after the stage is recorded. While Phase
2 trains, its state is written to a separate archive every two minutes.

If the token table is GPT-2's, the archive of the saved model contains no weights: the next `ctxkv run`
rewrites them from GPT-2's table on the Hub and the checkpoint. A token table that was computed from text is
kept in the archive, since a different processor would compute a slightly different table.
"""

import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import digest, expanded, remove, replacing
from ..method.loop import Metric
from ..progress import Listener
from .folder import MODEL, RECORDS, RunFolder

SAVE_SECONDS = 120  # minimum seconds between saves
STATE = (f"{RECORDS}/phase2.pt", "metrics.jsonl")  # files of the training state
SAME_EVERYWHERE = ("gpt2",)  # tables identical on every machine
# These options make `extractall` refuse paths outside the folder. They require Python 3.11.4 or newer.
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


@contextmanager
def kept_on_drive(*folders: Path | str, listener: Listener = lambda _: None) -> Iterator[Listener]:
    """Restore run folders from Google Drive before a `with` block, and save copies there while it runs.

        with kept_on_drive(folder, listener=live) as listener:
            run(config, folder, listener)

    Yields:
        a listener that calls `listener` and, at most every two minutes, writes the archives of newly finished
        stages and of the training state. If `$CTXKV_DRIVE` is not set, this is `listener` itself.

    Raises:
        UserError: An archive cannot be restored. If an archive cannot be written, only a message is printed.
    """
    drive = os.environ.get("CTXKV_DRIVE")
    if not drive:
        yield listener
        return
    copies = {}
    for folder in map(expanded, folders):
        # The name of a copy has a digest of the whole path, since several folders may have the same name.
        copies[folder] = expanded(drive) / f"{folder.name}-{digest(str(folder.absolute()))[:6]}"
    for folder, copy in copies.items():
        if copy.is_dir() and not folder.exists():
            _restore(folder, copy)
    due = time.monotonic() + SAVE_SECONDS

    def listen(metric: Metric) -> None:
        nonlocal due
        listener(metric)
        if "step" not in metric and time.monotonic() >= due:
            keep_all(copies)
            due = time.monotonic() + SAVE_SECONDS

    try:
        yield listen
    finally:
        keep_all(copies)


def _restore(folder: Path, copy: Path) -> None:
    """Extract a run's archives. The training state comes first, so finished stages overwrite its files."""
    archives = sorted(copy.glob("[!.]*.tar"), key=lambda archive: not archive.name.startswith("state"))
    with replacing(folder) as restored:
        for archive in archives:
            try:
                with tarfile.open(archive, "r:") as tar:
                    tar.extractall(restored, **SAFELY)
            except (OSError, tarfile.TarError) as error:
                advice = "move it away, and run the cell again to recompute that part."
                raise UserError(f"{archive} cannot be restored ({error}); {advice}") from error


def keep_all(copies: dict[Path, Path]) -> None:
    """Write the missing archives of each run folder, and delete its outdated archives."""
    for folder, copy in copies.items():
        archives = _archives(RunFolder.read(folder))
        for name, files in archives.items():
            if not (copy / name).is_file():
                _write(copy / name, folder, files)
        for archive in copy.glob("[!.]*.tar"):
            if archive.name not in archives:
                remove(archive)


def _archives(folder: RunFolder) -> dict[str, list[str]]:
    """Return the archives that a run should have, as `{archive name: paths of its files}`."""
    archives = {}
    for stage, record in folder.records.items():
        file = folder.record_file(stage)
        names = [*record.files, file.relative_to(folder.path).as_posix()]
        if stage == MODEL and folder.config.data.table in SAME_EVERYWHERE:
            names = [name for name in names if not name.endswith(".safetensors")]
        archives[f"{stage}-{digest(file.read_text(encoding='utf-8'))}.tar"] = names
    state = [name for name in STATE if (folder.path / name).is_file()]
    if state and "results" not in folder.records:
        times = [(folder.path / name).stat().st_mtime_ns for name in state]
        archives[f"state-{digest(times)}.tar"] = state
    return archives


def _write(archive: Path, folder: Path, files: list[str]) -> None:
    """Write an archive atomically. If Google Drive refuses the archive, print a message."""
    try:
        with replacing(archive) as temporary_path, tarfile.open(temporary_path, "w", dereference=True) as tar:
            for name in files:
                tar.add(folder / name, name)
    except OSError as error:
        print(f"Google Drive refused {archive.name} ({error.strerror or error}); training continues.")
