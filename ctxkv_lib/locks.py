"""Locks: one process at a time works in a run folder, or writes to the shared cache."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from .errors import DamagedFile, UserError, describe, is_disk_full
from .files import CACHE_VARIABLE, cache_dir, remove, sweep
from .progress import notice, say

LOCK = ".lock"  # the file stays when its owner is gone; the lock itself does not
T = TypeVar("T")


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keep other processes out of such a block of `folder`.

    Raises:
        UserError: another process is in one; the message names it. Or the folder cannot be made.
    """
    _make(folder, "name another folder with --out or $CTXKV_RUNS")
    path = folder / LOCK
    owner = "another process"
    with suppress(OSError, UnicodeDecodeError):  # Windows forbids reading a locked file
        owner = path.read_text(encoding="utf-8") or owner
    try:
        held = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder} is in use by {owner}; wait until that is done, stop it, or name another folder."
        ) from None
    with held:
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield


def made_once(read: Callable[[], T], make: Callable[[], object]) -> T:
    """Return `read()` from the shared cache, after `make()` if it is missing or damaged.

    Only one process at a time makes something; others wait.
    """
    with suppress(FileNotFoundError, NotADirectoryError, DamagedFile):
        return read()
    with _cache_lock():
        try:
            return read()  # another process has made it meanwhile
        except FileNotFoundError:
            pass
        except DamagedFile as error:
            notice(f"{error.path} cannot be used: {error.reason}; it is made again.")
            remove(error.path)
        make()
        return read()


@contextmanager
def _cache_lock() -> Iterator[None]:
    _make(cache_dir(), f"set ${CACHE_VARIABLE} to a folder for downloads and tables")
    lock = _lock_of(cache_dir(), os.getpid())
    is_nested = lock.is_locked  # by this thread, whose `make` needs something else that is made
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        say(f"Another process is writing to {cache_dir()}: waiting for it.")
        held = lock.acquire()
    with held:
        if not is_nested:
            sweep(cache_dir(), deep=False)  # runs may lie below
        yield


def _make(folder: Path, cure: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"{folder} cannot be made ({describe(error)}); {cure}.") from None


@cache
def _lock_of(folder: Path, _: int) -> FileLock:
    """Return one lock per folder and process: reentrant within a thread, not inherited by forks."""
    return FileLock(folder / LOCK)
