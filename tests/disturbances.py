"""Disturb a process at one of its file operations, or damage the files that it has left."""

import builtins
import errno
import io
import itertools
import multiprocessing
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import cut, flip

from ctxkv_lib.errors import UserError
from ctxkv_lib.store import store

DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "flip": flip,
    "empty": lambda file: file.write_bytes(b""),
    "delete": Path.unlink,
}


class Disturbance:
    """Disturbs a process at file operation number `at`.

    Args:
        kind: "kill" ends the process, "full" leaves no disk space from then on, "wipe" deletes the store.
    """

    WRITES = (
        (os, "replace"),
        (os, "mkdir"),
        (os, "fsync"),
        (os, "chmod"),
        (shutil, "copyfile"),
        (shutil, "copy2"),
    )
    DELETES = ((os, "unlink"), (os, "rmdir"), (shutil, "rmtree"))

    def __init__(self, kind: str = "", at: int | None = None) -> None:
        self.kind, self.at, self.count, self.rmtree = kind, at, 0, shutil.rmtree

    def begin(self) -> None:
        for pairs, is_write in ((self.WRITES, True), (self.DELETES, False)):
            for module, name in pairs:
                setattr(module, name, self._counted(getattr(module, name), is_write))
        opened = io.open

        def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not {*mode} & {*"wax+"}:
                return opened(file, mode, *args, **kwargs)
            self.happen(is_write=True)
            return _File(opened(file, mode, *args, **kwargs), self)

        io.open = builtins.open = open_file  # type: ignore[assignment]

    def _counted(self, function: Callable[..., Any], is_write: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.happen(is_write)
            return function(*args, **kwargs)

        return call

    def is_due(self, is_write: bool) -> bool:
        is_full = self.kind == "full" and is_write and self.at is not None and self.count >= self.at
        return is_full or self.count == self.at

    def happen(self, is_write: bool) -> None:
        if self.is_due(is_write):
            if self.kind == "kill":
                os._exit(9)
            if self.kind == "full" and is_write:
                self.count += 1
                raise OSError(errno.ENOSPC, "No space left on device")
            if self.kind == "wipe":
                self.at = None
                self.rmtree(store(), ignore_errors=True)
        self.count += 1


class _File:
    """A file whose writes may fail half-way."""

    def __init__(self, file: Any, disturbance: Disturbance) -> None:
        self.file, self.disturbance = file, disturbance

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, text: Any) -> int:
        if self.disturbance.is_due(True) and self.disturbance.kind != "wipe":
            self.file.write(text[: len(text) // 2])
            self.file.flush()
        self.disturbance.happen(is_write=True)
        return int(self.file.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@dataclass(frozen=True)
class Ended:
    """How a child ended: "done", "refused" (a UserError), "failed" (an OSError) or "killed"."""

    how: str
    value: Any
    operations: int
    said: str


def in_child(act: Callable[[], Any], kind: str = "", at: int | None = None) -> Ended:
    """Call `act` in a forked child that is disturbed. Any other error of `act` is raised here."""
    receive, send = multiprocessing.Pipe(False)

    def body() -> None:
        disturbance = Disturbance(kind, at)
        disturbance.begin()
        with redirect_stderr(io.StringIO()) as said:
            try:
                outcome: tuple[str, Any] = "done", act()
            except UserError as error:
                outcome = "refused", str(error)
            except OSError as error:
                outcome = "failed" if kind in ("full", "wipe") else "crashed", repr(error)
            except BaseException as error:
                outcome = "crashed", repr(error)
        send.send((*outcome, disturbance.count, said.getvalue()))
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    send.close()
    try:
        ended = Ended(*receive.recv())
    except EOFError:
        ended = Ended("killed", None, 0, "")
    process.join()
    assert ended.how != "crashed", ended
    return ended


def places(total: int, stride: int, first: int = 0) -> itertools.chain[int]:
    """Return the numbers of the file operations to disturb."""
    return itertools.chain(range(first % stride, total, stride))
