"""Keep copies of runs in Google Drive, since Colab deletes the files of a machine after each session.

If `$CTXKV_DRIVE` names a folder, `kept_on_drive` restores a run from its copy there, and updates the copy
while the run trains. A copy has the run folder in `run/` and, until Phase 2 is finished, the run's contexts
in `store/`. Each file is replaced atomically, records last, so a copy is usable whenever the machine is lost.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..files import digest, expanded, remove, replacing, visible_files
from ..method.callback import Metric
from ..progress import Listener, log
from ..store import ENTRY, store, wait_for_lock
from .steps import COMPARISON, STEPS

SAVE_SECONDS = 120  # minimum seconds between copies
RUN, STORE = "run", "store"  # folders of a copy


@contextmanager
def kept_on_drive(
    path: Path, entries: Callable[[], Sequence[Path]], listener: Listener
) -> Iterator[Listener]:
    """Keep a copy of a folder while the block runs. If `$CTXKV_DRIVE` is not set, do nothing.

    Args:
        entries: returns the entries of the store that an interrupted run would need to continue.

    Yields:
        a listener that calls `listener` and, at most every two minutes, updates the copy. The copy is also
        updated when the block ends.
    """
    if (copy := copy_of(path)) is None:
        yield listener
        return
    due = time.monotonic() + SAVE_SECONDS

    def listen(metric: Metric) -> None:
        nonlocal due
        listener(metric)
        if "step" not in metric and time.monotonic() >= due:
            keep(path, entries(), copy)
            due = time.monotonic() + SAVE_SECONDS

    try:
        yield listen
    finally:
        keep(path, entries(), copy)


def copy_of(path: Path) -> Path | None:
    """Return the folder of a run's copy in Google Drive, or None if `$CTXKV_DRIVE` is not set."""
    drive = os.environ.get("CTXKV_DRIVE")
    # The name has a digest of the whole path, since several folders may have the same name.
    return expanded(drive) / f"{path.name}-{digest(str(path.absolute()))[:6]}" if drive else None


def restore(path: Path) -> None:
    """Copy a folder, and the entries that it needs, back from Google Drive if they are missing here."""
    if (copy := copy_of(path)) is None or path.exists():
        return
    entries = [entry for entry in (copy / STORE).glob("[!.]*") if (entry / ENTRY).is_file()]
    # Records are copied last, so a copy without any was not finished, and has nothing to lose.
    folders = [copy / RUN] if any((copy / RUN / name).exists() for name in (STEPS, COMPARISON)) else []
    for source in [*entries, *folders]:
        target = path if source in folders else store() / source.name
        lock = target.with_name(f".{target.name}.lock")  # for an entry, the lock under which it is computed
        with wait_for_lock(lock, f"Another process restores {target.name}; waiting for it."):
            if not target.exists():
                with replacing(target) as temporary_path:
                    shutil.copytree(source, temporary_path, ignore=shutil.ignore_patterns(".*"))


def keep(path: Path, entries: Sequence[Path], copy: Path) -> None:
    """Update the copy of a folder and of its entries. If Google Drive refuses, print a message."""
    if not path.is_dir():
        return
    try:
        for entry in entries:
            _mirror(entry, copy / STORE / entry.name)
        _mirror(path, copy / RUN)
        for entry in (copy / STORE).glob("[!.]*"):
            if entry.name not in [kept.name for kept in entries]:
                remove(entry)
    except OSError as error:
        log(f"Google Drive refused a copy ({error.strerror or error}); training continues.")


def _mirror(source: Path, target: Path) -> None:
    """Make a folder a copy of another one. Records are copied last, and extra files are deleted then."""
    files = {file.relative_to(source): file for file in visible_files(source)}
    for name in sorted(files, key=lambda name: (name.parent.name == STEPS, name.name == ENTRY)):
        if not _is_copy(files[name], target / name):
            with replacing(target / name) as temporary_path:
                shutil.copy2(files[name], temporary_path)
    for file in [*visible_files(target)] if target.is_dir() else ():
        if file.relative_to(target) not in files:
            remove(file)


def _is_copy(file: Path, copy: Path) -> bool:
    """Return whether a copy has the size of a file and the time of its last change, in whole seconds."""
    if not copy.is_file():
        return False
    new, old = file.stat(), copy.stat()
    return (old.st_size, int(old.st_mtime)) == (new.st_size, int(new.st_mtime))
