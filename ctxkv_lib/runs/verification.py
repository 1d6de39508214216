"""`ctxkv verify`: compares every file of a run folder with its record."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DamagedFile, UserError
from ..files import read_json, tensor_metadata
from .configure import run_command, stored_config
from .package_code import code_of
from .records import DROPPED, FILE, STAGES, Records
from .run_folder import CONFIG, MODEL_MARK


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
    is_of_other_code: bool = False  # of the method, than is installed

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
        if not (path / CONFIG).is_file() or (path / MODEL_MARK).is_file():
            raise UserError(f"{path} holds no finished stage; name a run folder, or make a run there.")
        command = run_command(stored_config(path, read_json(path / CONFIG)), path)
        if not (path / "summary.json").is_file():
            raise UserError(f"{path} holds no finished stage; make it with `{command}`.")
        return Verification([Artefact("records", FILE, 0, "missing")], list(STAGES), f"`{command} --again`")
    recorded = {name for record in records.stages.values() for name in record.files}
    states = {stage: record.states(path) for stage, record in records.stages.items()}
    states["under way"] = _checkpoints(path, recorded)
    found = [
        Artefact(stage, name, (path / name).stat().st_size if (path / name).is_file() else 0, state)
        for stage, files in states.items()
        for name, state in files
    ]
    ended = "results" in records.stages  # some stages may not apply to this run
    unfinished = [] if ended else [stage for stage in STAGES if stage not in records.stages]
    config = stored_config(path, records.config)
    is_other = records.code != code_of(config)
    return Verification(found, unfinished, f"`{run_command(config, path)}`", is_other)


def _checkpoints(path: Path, recorded: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the saved states of an unfinished training, which carry their own checksum."""
    for file in sorted((path / "checkpoint").glob("[!.]*.safetensors")):
        name = file.relative_to(path).as_posix()
        if name not in recorded:
            try:
                tensor_metadata(file)
                yield name, "intact"
            except DamagedFile:
                yield name, "damaged"
