"""Copies of run folders in Google Drive, for machines such as Colab's that are gone after a session."""

import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import digest, expanded, replacing
from ..method.loop import Metric
from ..progress import Listener

SAVE_SECONDS = 120  # between two archives while a run trains
# Refuses paths that lead outside; Python 3.11.4 is the first that can.
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


@contextmanager
def kept_on_drive(*folders: Path | str, listener: Listener = lambda _: None) -> Iterator[Listener]:
    """Restore run folders from Google Drive before the block, and keep an archive of each there.

        with kept_on_drive(folder, listener=live) as listener:
            run(config, folder, listener)

    Yields:
        `listener`, which now also saves every two minutes, but not within an epoch. Nothing but `listener`
        itself unless `$CTXKV_DRIVE` names a folder.

    Raises:
        UserError: an archive cannot be restored. One that cannot be written is one line of text.
    """
    drive = os.environ.get("CTXKV_DRIVE")
    if not drive:
        yield listener
        return
    archives = {}
    for folder in map(expanded, folders):  # two of one name in different places have different archives
        archives[folder] = expanded(drive) / f"{folder.name}-{digest(str(folder.absolute()))[:6]}.tar"
    for folder, archive in archives.items():
        if archive.is_file() and not folder.exists():
            try:
                with replacing(folder) as beside, tarfile.open(archive, "r:") as tar:
                    tar.extractall(beside, **SAFELY)
            except (OSError, tarfile.TarError) as error:
                advice = "move it away, and run the cell again to begin anew."
                raise UserError(f"{archive} cannot be restored ({error}); {advice}") from error
    due = time.monotonic() + SAVE_SECONDS

    def listen(metric: Metric) -> None:
        nonlocal due
        listener(metric)
        if "step" not in metric and time.monotonic() >= due:
            pack_all(archives)
            due = time.monotonic() + SAVE_SECONDS

    try:
        yield listen
    finally:
        pack_all(archives)


def pack_all(archives: dict[Path, Path]) -> None:
    """Write each folder to its archive, complete or not at all, without hidden files such as locks."""
    for folder, archive in archives.items():
        if not folder.is_dir():
            continue
        try:
            with replacing(archive) as beside, tarfile.open(beside, "w", dereference=True) as tar:
                tar.add(folder, ".", filter=lambda member: None if "/." in member.name else member)
        except OSError as error:
            print(f"Google Drive did not take {archive.name} ({error.strerror or error}); training goes on.")
