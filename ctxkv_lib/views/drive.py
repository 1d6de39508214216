"""Runs kept in Google Drive: one archive a run, brought back before a cell trains and saved while it does.

Drive is slow with many small files, so training works on the local disk. Colab may take its machine back at
any moment, and then nothing that was to be done at the end is done.
"""

import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import DamagedFile, UserError
from ..files import read_json
from ..progress import Listener, Metric
from ..runs.records import FILE, Records
from ..runs.run_folder import COMPARISON

DRIVE_VARIABLE = "CTXKV_DRIVE"
SAVE_SECONDS = 60  # between two saves within a stage, at least ...
SAVE_SHARE = 0.05  # ... and saving may cost so much of the time
STATE = ".state.json"  # first member of an archive: how far its run has come
LANDMARKS = ("caches/train_ctx.safetensors", "caches/val_ctx.safetensors", "model/model.safetensors")
FINISHED = [*LANDMARKS, "summary.json"]
RECORDS = ("config.json", COMPARISON, "metrics.jsonl", FILE)

State = dict[str, Any]  # progress: compared as a list; content: changes when what was recorded does


@contextmanager
def kept_on_drive(*folders: Path, listener: Listener = lambda _: None) -> Iterator[Listener]:
    """Bring folders back from Google Drive before the block, and save them during and after it.

        with kept_on_drive(folder, listener=live) as listener:
            run(config, folder, listener)

    Yields:
        `listener`, which now also saves: after every stage, and within one as often as `SAVE_SECONDS` and
        `SAVE_SHARE` allow. Nothing but `listener` itself unless `$CTXKV_DRIVE` names a folder.

    Raises:
        UserError: an archive cannot be restored. One that cannot be written is one line of text.
    """
    if not os.environ.get(DRIVE_VARIABLE):
        yield listener
        return
    copies = DriveCopies(Path(os.environ[DRIVE_VARIABLE]), folders, listener)
    copies.restore()
    try:
        yield copies
    finally:
        copies.save(last=True)


class DriveCopies:
    """A listener that passes metrics on and keeps an archive of each folder up to date."""

    def __init__(
        self,
        drive: Path,
        folders: Sequence[Path],
        listener: Listener,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._archives = {folder: drive / f"{folder.name}.tar" for folder in folders}
        self._listener = listener
        self._clock = clock
        self._stage: tuple[Any, ...] | None = None
        self._due = 0.0
        self._said: set[str] = set()

    def __call__(self, metric: Metric) -> None:
        self._listener(metric)
        stage = metric["stage"], metric.get("samples")
        if stage != self._stage or self._clock() >= self._due:
            self._stage = stage
            self.save()

    def restore(self) -> None:
        """Unpack the archive of each folder that is not here."""
        for folder, archive in self._archives.items():
            if archive.is_file() and not folder.exists():
                unpack(archive, folder)

    def save(self, last: bool = False) -> None:
        """Write the archive of each folder that has come further than its archive."""
        began = self._clock()
        for folder, archive in self._archives.items():
            try:
                self._save(folder, archive, last)
            except OSError as error:
                reason = error.strerror or error
                self._say(f"Google Drive did not take {archive.name} ({reason}); training goes on.")
        ended = self._clock()
        self._due = ended + max(SAVE_SECONDS, (ended - began) / SAVE_SHARE)

    def _save(self, folder: Path, archive: Path, last: bool) -> None:
        state, held = state_of(folder), archived_state(archive)
        if state is None or state == held:
            return
        if held is None or state["progress"] >= held["progress"]:
            pack(folder, archive, state)
        elif last:
            self._say(f"{archive} holds a fuller state of {folder.name} and stays as it is.")

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            print(line, flush=True)


def state_of(folder: Path) -> State | None:
    """How far the run or comparison in a folder has come; None if it holds none.

    Of two states the greater `progress` is the fuller one. Two finished runs are equally full, whatever their
    numbers of epochs; so are two comparisons.
    """
    records = [path.read_bytes() if (path := folder / name).is_file() else b"" for name in RECORDS]
    if not any(records):
        return None
    there = sum((folder / name).is_file() for name in FINISHED)
    lines = 0 if there == len(FINISHED) else records[RECORDS.index("metrics.jsonl")].count(b"\n")
    progress = [int((folder / COMPARISON).is_file()), there, _stages_done(folder), lines]
    return {"progress": progress, "content": sha256(b"\0".join(records)).hexdigest()}


def _stages_done(folder: Path) -> int:
    try:
        records = Records.read(folder)
    except DamagedFile:
        return 0
    return len(records.stages) if records else 0


def archived_state(archive: Path) -> State | None:
    """The state of what an archive holds; None if there is no archive, or none that can be read.

    An archive that does not say counts as finished, so that nothing less replaces it.
    """
    try:
        with tarfile.open(archive) as tar:
            first = tar.next()
            content = tar.extractfile(first) if first and first.name == STATE else None
            return json.load(content) if content else {"progress": [0, len(FINISHED)], "content": ""}
    except (FileNotFoundError, tarfile.TarError, ValueError):
        return None


def pack(folder: Path, archive: Path, state: State) -> None:
    """Write `folder` as an archive beside its place, which it then takes; nothing hidden goes into it."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    beside = archive.with_name(f".{archive.name}.part")  # always the same: a cut-off one is written over
    try:
        with beside.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                first, content = tarfile.TarInfo(STATE), json.dumps(state).encode()
                first.size = len(content)
                tar.addfile(first, io.BytesIO(content))
                tar.add(folder, folder.name, filter=_shown)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, archive)
    finally:
        beside.unlink(missing_ok=True)


def _shown(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if Path(member.name).name.startswith(".") else member


def unpack(archive: Path, folder: Path) -> None:
    """Restore `folder`, completely or not at all.

    Raises:
        UserError: the archive is damaged, or a member would leave the folder, or there is no room.
    """
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)  # of a restore that was killed
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(beside, filter="data")
        found, said = state_of(beside / folder.name), beside / STATE
        if said.is_file() and found != read_json(said):
            raise tarfile.ReadError("it is not complete")
        os.replace(beside / folder.name, folder)
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{archive} cannot be restored ({error}); run the cell again, or move that archive away to begin "
            "anew."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
