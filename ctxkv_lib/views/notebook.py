"""Shared code of notebooks: parameters, folder of the runs, and copies of runs in Google Drive.

Drive is slow with many small files, so training works on the local disk, and an archive of each run is
restored before a cell trains and saved while it does. Colab may disconnect at any moment, so archives are
also written during training.
"""

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import expanded, read_json, remove, replacing
from ..progress import Listener, Metric
from ..runs.config import ExperimentConfig, build_config
from ..runs.configure import compared_samples, configure
from ..runs.records import FILE
from ..runs.run_folder import COMPARISON, ROOT_VARIABLE

Parameters = tuple[str, int | None, str | None, int | None]  # preset, samples, recipe, seed

DRIVE_VARIABLE = "CTXKV_DRIVE"
SAVE_SECONDS = 60  # between two saves within a stage, at least ...
SAVE_SHARE = 0.05  # ... and the largest share of the time for saving
STATE = ".state.json"  # first member of an archive: the progress of its run
RECORDS = ("config.json", COMPARISON, "metrics.jsonl", FILE)
LANDMARKS = ("caches/train_ctx.safetensors", "caches/val_ctx.safetensors", "model/model.safetensors")
FINISHED = (*LANDMARKS, "summary.json")

State = dict[str, Any]  # progress: compared as a list; content: changes when the records do


def parameters(preset: Any, samples: Any, recipe: Any, seed: Any) -> Parameters:
    """Read a notebook's parameters: the values of its form, as text, unless the environment has others.

    `$CTXKV_PRESET`, `$CTXKV_SAMPLES`, `$CTXKV_RECIPE` and `$CTXKV_SEED` override the form; a
    line is printed for each change. An empty preset (or None) becomes `colab` on Colab, and `offline`, which
    needs no network, elsewhere. Other empty values become None: the preset's value is used.

    Raises:
        UserError: `samples` or `seed` is no whole number.
    """
    form = {"preset": preset, "samples": samples, "recipe": recipe, "seed": seed}
    values = {}
    for name, given in form.items():
        text, variable = "" if given is None else str(given).strip(), f"CTXKV_{name.upper()}"
        values[name] = os.environ.get(variable, "").strip() or text
        if text not in ("", values[name]):
            print(f"{name} is {values[name]}, as {variable} says, and not {text}.")
    numbers = {name: _whole_number(name, values[name]) for name in ("samples", "seed")}
    default = "colab" if "google.colab" in sys.modules else "offline"
    return values["preset"] or default, numbers["samples"], values["recipe"] or None, numbers["seed"]


def _whole_number(name: str, value: str) -> int | None:
    try:
        return int(value) if value else None
    except ValueError:
        raise UserError(f"{name} is {value!r}; allowed: a whole number, or nothing.") from None


def notebook_config(
    preset: str,
    samples: int | None = None,
    recipe: str | None = None,
    seed: int | None = None,
    settings: dict[str, Any] | None = None,
) -> ExperimentConfig:
    """Build the experiment of a notebook's parameters; None takes the preset's value."""
    seeded = {} if seed is None else {"runtime.seed": seed}
    return configure(preset, recipe, samples, {**seeded, **(settings or {})}, print)


def comparison_counts(preset: str, samples: int | None) -> tuple[int, int]:
    """Return the sample counts of the two runs to compare, as `compared_samples` of a preset."""
    return compared_samples(build_config(preset, samples=samples))


def runs_root() -> Path:
    """Return the folder of all runs: `$CTXKV_RUNS`, or `runs` at the top of the clone (on Colab, here)."""
    if root := os.environ.get(ROOT_VARIABLE):
        return expanded(root)
    here = Path.cwd()
    return (here.parent if (here.parent / "ctxkv_lib" / "__init__.py").is_file() else here) / "runs"


@contextmanager
def kept_on_drive(*folders: Path | str, listener: Listener = lambda _: None) -> Iterator[Listener]:
    """Restore folders from Google Drive before the block, and save them during and after it.

        with kept_on_drive(folder, listener=live) as listener:
            run(config, folder, listener)

    Yields:
        `listener`, which now also saves: with the first metric of every stage, and with later ones as often
        as `SAVE_SECONDS` and `SAVE_SHARE` allow. Nothing but `listener` itself unless `$CTXKV_DRIVE` names a
        folder.

    Raises:
        UserError: an archive cannot be restored. One that cannot be written is one line of text.
    """
    if not os.environ.get(DRIVE_VARIABLE):
        yield listener
        return
    copies = DriveCopies(expanded(os.environ[DRIVE_VARIABLE]), [*map(expanded, folders)], listener)
    for folder, archive in copies.archives.items():
        if archive.is_file() and not folder.exists():
            unpack(archive, folder)
    try:
        yield copies
    finally:
        copies.save(last=True)


class DriveCopies:
    """A listener that passes metrics on and keeps an archive of each folder up to date."""

    def __init__(self, drive: Path, folders: Sequence[Path], listener: Listener) -> None:
        self.archives = {folder: drive / f"{folder.name}.tar" for folder in folders}
        self._listener = listener
        self._stage: tuple[Any, ...] | None = None
        self._due = 0.0
        self._say_once = cache(print)

    def __call__(self, metric: Metric) -> None:
        self._listener(metric)
        stage = metric["stage"], metric.get("samples")
        if stage != self._stage or time.monotonic() >= self._due:
            self._stage = stage
            self.save()

    def save(self, last: bool = False) -> None:
        """Write the archive of each folder that has progressed since the last one."""
        began = time.monotonic()
        for folder, archive in self.archives.items():
            state, held = state_of(folder), archived_state(archive)
            if state is None or state == held:
                continue
            if held and state["progress"] < held["progress"]:
                if last:
                    print(f"{archive} holds a fuller state of {folder.name} and stays as it is.")
                continue
            try:
                pack(folder, archive, state)
            except OSError as error:
                reason = error.strerror or error
                self._say_once(f"Google Drive did not take {archive.name} ({reason}); training goes on.")
        ended = time.monotonic()
        self._due = ended + max(SAVE_SECONDS, (ended - began) / SAVE_SHARE)


def state_of(folder: Path) -> State | None:
    """Return the progress of the run or comparison in a folder; None if it holds none.

    The state with the greater `progress` is the later one. Finished runs are equal, whatever their numbers
    of epochs; so are two comparisons.
    """
    records = [path.read_bytes() if (path := folder / name).is_file() else b"" for name in RECORDS]
    if not any(records):
        return None
    there = sum((folder / name).is_file() for name in FINISHED)
    lines = 0 if there == len(FINISHED) else records[RECORDS.index("metrics.jsonl")].count(b"\n")
    progress = [int((folder / COMPARISON).is_file()), there, lines]
    return {"progress": progress, "content": sha256(b"\0".join(records)).hexdigest()}


def archived_state(archive: Path) -> State | None:
    """Return the state in an archive; None if it is missing or unreadable."""
    try:
        with tarfile.open(archive) as tar:
            first = tar.next()
            content = tar.extractfile(first) if first and first.name == STATE else None
            return json.load(content) if content else None
    except (OSError, tarfile.TarError, ValueError):
        return None


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Do as `replacing`, and remove what a machine left that was taken back; not what others write here."""
    for left in path.parent.glob(f".{path.name}.*.part"):
        remove(left)
    with replacing(path) as beside:
        yield beside


def pack(folder: Path, archive: Path, state: State) -> None:
    """Write `folder` to an archive, complete or not at all, without hidden files."""
    with _replacing(archive) as beside, tarfile.open(beside, "w", dereference=True) as tar:
        first, content = tarfile.TarInfo(STATE), json.dumps(state).encode()
        first.size = len(content)
        tar.addfile(first, io.BytesIO(content))
        tar.add(folder, folder.name, filter=lambda m: None if Path(m.name).name.startswith(".") else m)


def unpack(archive: Path, folder: Path) -> None:
    """Restore `folder`, completely or not at all.

    Raises:
        UserError: the archive is damaged, or a member would leave the folder, or the disk is full.
    """
    try:
        with _replacing(folder) as beside, tarfile.open(archive) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                member.name = member.name.removeprefix(f"{folder.name}/")
                tar.extract(member, beside, filter="data")
            if state_of(beside) != read_json(beside / STATE):
                raise tarfile.ReadError("it is not complete")
            (beside / STATE).unlink()
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{archive} cannot be restored ({error}); run the cell again, or move that archive away to begin "
            "anew."
        ) from error
