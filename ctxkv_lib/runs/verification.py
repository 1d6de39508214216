"""`ctxkv verify`: compares every file of a run folder with its record."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import DamagedFile, UserError
from ..files import tensor_metadata
from .configure import run_command, stored_config
from .records import DROPPED, FILE, STAGES, Records

MIB = 2**20


@dataclass(frozen=True)
class Artefact:
    """One file of a run folder."""

    stage: str
    name: str  # path in the folder
    num_bytes: int  # 0 if it is missing
    state: str  # intact | missing | damaged | dropped


@dataclass(frozen=True)
class Verification:
    """The result of `verify`."""

    artefacts: list[Artefact]
    unfinished: list[str]  # stages without a record, of an unfinished run
    cure: str  # the command that rebuilds missing files and finishes the run

    @property
    def intact(self) -> bool:
        """Return whether all files are intact or dropped."""
        return all(artefact.state in ("intact", DROPPED) for artefact in self.artefacts)


def verify(path: Path) -> Verification:
    """Read every artefact of a run, finished or not, and compare it with its record.

    Raises:
        UserError: there is no run.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; name a run folder.")
    try:
        records = Records.read(path)
    except DamagedFile as error:
        lost = Artefact("records", FILE, error.path.stat().st_size, "damaged")
        return Verification([lost], list(STAGES), f"the command that made {path}")
    if records is None:
        raise UserError(f"{path} holds no finished stage; name a run folder, or make a run there.")
    found = [
        _artefact(path, stage, name, state)
        for stage, record in records.stages.items()
        for name, state in record.states(path)
    ]
    found += _checkpoints(path, {artefact.name for artefact in found})
    ended = "results" in records.stages  # some stages may not apply to this run
    unfinished = [] if ended else [stage for stage in STAGES if stage not in records.stages]
    return Verification(found, unfinished, f"`{run_command(stored_config(path, records.config), path)}`")


def _artefact(path: Path, stage: str, name: str, state: str) -> Artefact:
    is_absent = state in ("missing", DROPPED)
    return Artefact(stage, name, 0 if is_absent else (path / name).stat().st_size, state)


def _checkpoints(path: Path, recorded: set[str]) -> list[Artefact]:
    """Check the saved states of an unfinished training, which carry their own checksum."""
    found = []
    for file in sorted((path / "checkpoint").glob("[!.]*.safetensors")):
        name = file.relative_to(path).as_posix()
        if name in recorded:
            continue
        try:
            tensor_metadata(file)
            state = "intact"
        except DamagedFile:
            state = "damaged"
        found.append(_artefact(path, "under way", name, state))
    return found
