"""`ctxkv verify`: every artefact of a run folder against its record."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DamagedFile, UserError
from ..files import tensor_metadata
from .ownership import run_command, stored_config
from .records import DROPPED, FILE, STAGES, Records


@dataclass(frozen=True)
class Artefact:
    """One file of a run folder."""

    stage: str
    name: str  # path in the folder
    num_bytes: int  # 0 if it is missing
    state: str  # intact | missing | damaged | dropped


@dataclass(frozen=True)
class Verification:
    """What a run folder holds."""

    artefacts: list[Artefact]
    unfinished: list[str]  # stages without a record, of a run that has not come to its end
    cure: str  # what makes again what is not intact, and goes on with what is unfinished

    @property
    def intact(self) -> bool:
        """Whether every file that should be there is the one it was."""
        return all(artefact.state in ("intact", DROPPED) for artefact in self.artefacts)


def verify(path: Path) -> Verification:
    """Read every artefact of a run, finished or not, and compare it with its record.

    Raises:
        UserError: there is no run, or one of a version that kept no checksums.
    """
    try:
        records = Records.read(path)
    except DamagedFile as error:
        lost = Artefact("records", FILE, error.path.stat().st_size, "damaged")
        return Verification([lost], list(STAGES), f"the command that made {path}")
    if records is None:
        raise UserError(f"{path} holds no finished stage with checksums; run what made it once more.")
    found = [
        _artefact(path, stage, name, how)
        for stage, record in records.stages.items()
        for name, how in record.states(path)
    ]
    cure = f"`{run_command(stored_config(path, records.config), path)}`"
    ended = "results" in records.stages  # which a measure that such runs do not have is no part of
    unfinished = [] if ended else [stage for stage in STAGES if stage not in records.stages]
    return Verification([*found, *_under_way(path, {each.name for each in found})], unfinished, cure)


def _artefact(path: Path, stage: str, name: str, how: str) -> Artefact:
    absent = how in ("missing", DROPPED)
    return Artefact(stage, name, 0 if absent else (path / name).stat().st_size, how)


def _under_way(path: Path, recorded: set[str]) -> Iterator[Artefact]:
    """Checkpoints that no record names yet; they carry their own checksum."""
    for file in sorted((path / "checkpoint").glob("[!.]*.safetensors")):
        name = file.relative_to(path).as_posix()
        if name not in recorded:
            try:
                tensor_metadata(file)
                how = "intact"
            except DamagedFile:
                how = "damaged"
            yield _artefact(path, "under way", name, how)
