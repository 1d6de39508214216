"""The steps of a run: reuse what is finished, compute what is missing, and say what has changed.

A *step* writes files into the run folder and then its record, `steps/NAME.json` (`store.Record`). It is
reused if its record has the inputs that are asked for, its files are intact, and it was made from the files
that earlier steps have now. Otherwise it is computed again, and a message says why. There is one exception: a
step with a `state`, Phase 2, may have taken hours. It is replaced only with `RunFolder.again`, even if it is
damaged.

A run folder has these files:

- `config.json` and `own_parts/{block,loss,layer}.py`, the source text of the user's own parts.
- `steps/NAME.json`, one record per finished step.
- `token_vectors.safetensors`, from which the token table is made, if it was computed from text.
- `weights.safetensors`, the weights of the block and the layer.
- `phase2.pt`, the state of Phase 2 while it trains.
- `summary.json`, `metrics.jsonl`, `report.md`, `report.ja.md` and `figures/`.
- `.lock`, and hidden `.part` files while something is written (`files.replacing`).

A step's files are written first and its record last, so a record is right even after a kill.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import DamagedFile, UserError
from ..files import read_json, remove, remove_leftovers, visible_files, write_text
from ..method.callback import Metric
from ..progress import Listener, log
from ..store import Compute, Inputs, Record, Work, flat, inputs_of
from .config import ExperimentConfig, config_from_dict

OWN_PARTS = "own_parts"  # folder for the user's source code
STEPS, LOCK = "steps", ".lock"
CONFIG, SUMMARY, METRICS, COMPARISON = "config.json", "summary.json", "metrics.jsonl", "comparison.json"
REPORTS = {"en": "report.md", "ja": "report.ja.md"}  # by language
SETTINGS, RESULTS = "settings", "results"  # the first and the last step
# What is made from the numbers of a run. It is deleted before these numbers change.
FROM_NUMBERS = (*REPORTS.values(), "figures", SUMMARY, f"{STEPS}/{RESULTS}.json")
STORE_PREFIX = "store/"  # begins the name of an entry in `Record.uses`
FOLDER_OF_04 = "checkpoint"  # a folder in every run of version 0.4 and earlier
LOCATION = "data.path"  # not compared, since the content of the user's data counts
MOST_DESCRIBED = 3  # maximum number of differences per message


def describe(recorded: Inputs, asked: Inputs, defaults: Mapping[str, Any]) -> str:
    """Describe in words how inputs differ. Return "" if they do not.

    Settings are shown with both values. A setting that did not exist when `recorded` was made had its
    default. A digest that one of the sides lacks is not compared.
    """
    old, new = flat(recorded), flat(asked)
    words = []
    for name in {**old, **new}:
        if name[0] == "#":
            if name in old and name in new and old[name] != new[name]:
                words.append(f"the {name[1:]} differs")
        elif name != LOCATION:
            before = old.get(name, defaults.get(name)) if name in new else old[name]
            if before != new.get(name):
                words.append(f"{name} {before} → {new.get(name)}")
    more = len(words) - MOST_DESCRIBED
    return ", ".join(words[:MOST_DESCRIBED]) + (f" and {more} more" if more > 0 else "")


@dataclass
class RunFolder:
    """A run folder that this process has locked.

    Attributes:
        again: whether a trained Phase 2 may be replaced.
        listener: called with each metric; metrics of earlier calls have `"replayed": True`.
        defaults: the default of each setting, by name.
    """

    path: Path
    again: bool = False
    listener: Listener = lambda metric: None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def file(self, step: str) -> Path:
        """Return the path of a step's record."""
        return self.path / STEPS / f"{step}.json"

    def listen(self, metric: Metric) -> None:
        """Append a metric to metrics.jsonl, so that users can follow the training, and tell the listener."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(metric_lines([metric]))
        self.listener(metric)


def records(path: Path) -> dict[str, Record]:
    """Return the readable records of a run, except those made from other files of an earlier step."""
    files = sorted((path / STEPS).glob("[!.]*.json"))
    readable = {file.stem: record for file in files if (record := Record.read(file))}
    outputs = {name: record.output for name, record in readable.items()}
    return {
        name: record
        for name, record in readable.items()
        if all(
            outputs.get(used) == output for used, output in record.uses.items() if STORE_PREFIX not in used
        )
    }


def metric_lines(metrics: Sequence[Metric]) -> str:
    """Return metrics as lines of metrics.jsonl, without memory use."""
    kept = [{name: value for name, value in metric.items() if name != "memory"} for metric in metrics]
    return "".join(json.dumps(metric) + "\n" for metric in kept)


@contextmanager
def claimed(folder: RunFolder) -> Iterator[RunFolder]:
    """Lock a run folder while the block runs, and delete what a killed process left in it.

    Raises:
        UserError: The folder is in use, or has files but no run of this version.
    """
    path = folder.path
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose another folder with --out.")
    with lock_or_refuse(path):
        if (path / FOLDER_OF_04).is_dir():
            raise UserError(of_another_version(path))
        if any(visible_files(path)) and not (path / STEPS).is_dir():
            raise UserError(
                f"{path} is not empty and does not contain a run; choose another folder with --out."
            )
        remove_leftovers(path, "**/.*.part")
        (path / STEPS).mkdir(exist_ok=True)
        yield folder


@contextmanager
def lock_or_refuse(path: Path) -> Iterator[None]:
    """Lock a folder while the block runs. Raises UserError if another process has locked it."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{path} is in use by another process; wait until it is done, or choose another folder."
        ) from None
    with lock:
        yield


def require_same_settings(path: Path, config: ExperimentConfig) -> Inputs:
    """Raise UserError if a folder contains a run with other settings than `config`.

    Returns:
        the recorded inputs of the run's settings, or those of `config` if there are none.
    """
    values = {name: value for name, value in config.flat().items() if not name.endswith(".code")}
    inputs, record = inputs_of(values, {}), Record.read(path / STEPS / f"{SETTINGS}.json")
    if record:
        recorded = record.inputs
    else:  # the record may be lost, but the records of other steps have settings, too
        known = {
            name: value for record in records(path).values() for name, value in flat(record.inputs).items()
        }
        recorded = inputs_of(values | {name: known[name] for name in values.keys() & known.keys()}, {})
    if words := describe(recorded, inputs, config.defaults()):
        raise UserError(f"{path} contains another experiment: {words}; choose another folder with --out.")
    return recorded


def recorded_decisions(path: Path) -> dict[str, Any] | None:
    """Return what was decided when a run was begun, such as its precision, or None if it is not recorded."""
    record = Record.read(path / STEPS / f"{SETTINGS}.json")
    return record.numbers if record else None


def record_settings(
    folder: RunFolder, config: ExperimentConfig, decisions: dict[str, Any], compute: Compute
) -> None:
    """Record the settings of a run, which is its first step.

    Args:
        decisions: what is decided when a run is begun, such as its precision. A continued run keeps it.
        compute: writes config.json.

    Raises:
        UserError: The folder contains a run with other settings.
    """
    inputs = require_same_settings(folder.path, config)
    step(folder, SETTINGS, inputs, lambda work: compute(work) | decisions, [CONFIG])


def step(
    folder: RunFolder,
    name: str,
    inputs: Inputs,
    compute: Compute,
    files: Sequence[str] = (),
    state: str = "",
) -> Record:
    """Reuse a step, or compute it and write its record.

    Args:
        inputs: the inputs that are asked for; steps in `inputs["before"]` must have been called before.
        compute: writes `files`, and returns the step's part of the summary.
        files: the step's files.
        state: the file from which an interrupted computation continues. A step that has one may take hours,
            so it is replaced only with `folder.again`.

    Raises:
        UserError: The folder has this step with a `state` from other inputs, or with damaged files.
    """
    valid, record = records(folder.path), Record.read(folder.file(name))
    reason = _reason_to_compute(folder, name, inputs, record, valid, files, state)
    if record and not reason:
        for metric in record.metrics:
            folder.listener({**metric, "replayed": True})
        if state:  # a process may have been killed between writing the record and deleting the state
            remove(folder.path / state)
        return record
    if reason and state:
        _refuse_unless_asked(folder, reason)
    if reason and name != RESULTS:
        log(f"{name}: computed again, since {reason}.")
    is_other = bool(record and describe(record.inputs, inputs, folder.defaults))
    for part in (*(FROM_NUMBERS if state or is_other else ()), *files, f"{STEPS}/{name}.json"):
        remove(folder.path / part)
    if state:
        write_text(folder.path / METRICS, "")
    uses = {before: valid[before].output for before in inputs["before"] if before in valid}
    work = Work(folder.path, inputs, uses, folder.listen)
    record = work.record(compute(work), files).write(folder.file(name))
    if state:
        remove(folder.path / state)
    return record


def _reason_to_compute(
    folder: RunFolder,
    name: str,
    inputs: Inputs,
    record: Record | None,
    valid: Mapping[str, Record],
    files: Sequence[str],
    state: str,
) -> str:
    """Return why a step that the folder has must be computed. Return "" if it can be reused, or is new."""
    if record:
        words = describe(record.inputs, inputs, folder.defaults) or record.damage(folder.path)
        return words or ("" if name in valid else "an earlier step was computed again")
    # A killed process may leave files without a record, but then there is a state.
    is_lost = (
        state and not (folder.path / state).exists() and any((folder.path / part).exists() for part in files)
    )
    return f"{folder.file(name)} is missing or damaged" if is_lost or folder.file(name).exists() else ""


def refuse_to_replace(folder: RunFolder, name: str, inputs: Inputs) -> None:
    """Raise UserError if a step was made from other inputs, unless `folder.again`.

    This is called for Phase 2 before any step is computed, so that a refused run changes nothing.
    """
    record = Record.read(folder.file(name))
    if record and (words := describe(record.inputs, inputs, folder.defaults)):
        _refuse_unless_asked(folder, words)


def _refuse_unless_asked(folder: RunFolder, reason: str) -> None:
    """Raise UserError, since a trained model would be replaced, unless `folder.again`."""
    if not folder.again:
        raise UserError(
            f"{folder.path} contains a trained model, but {reason}; replace it with --again (again=True), or "
            "choose another folder with --out."
        )


def finished(path: Path, *steps: str, only_size: bool = False) -> dict[str, Record]:
    """Return the records of a run after checking the files of the given steps.

    With `only_size`, the contents of the files are not read.

    Raises:
        UserError: There is no run of this version, it has not finished these steps, or a file is damaged.
    """
    if not (path / STEPS).is_dir():
        raise UserError(no_run(path))
    valid = records(path)
    for name in steps:
        if name not in valid:
            raise UserError(f"{path} has not finished; continue with `ctxkv run --out {path}`.")
        if damage := valid[name].damage(path, only_size):
            raise UserError(f"{damage}; {repair(path, name)}.")
    return valid


def repair(path: Path, step: str) -> str:
    """Say which command repairs a damaged step. Only `--again` replaces a trained model."""
    return f"repair it with `ctxkv run --out {path}{' --again' if step == 'phase2' else ''}`"


def config_of(path: Path) -> ExperimentConfig:
    """Return the configuration of a run, from config.json if its record is lost.

    Raises UserError if both are lost, or of another version.
    """
    decisions = recorded_decisions(path)
    if decisions is None and not (path / CONFIG).is_file():
        raise DamagedFile(path / STEPS / f"{SETTINGS}.json", "it is missing or its checksum differs")
    try:
        return config_from_dict(decisions["config"] if decisions else read_json(path / CONFIG))
    except (UserError, AttributeError, LookupError, TypeError):
        raise UserError(of_another_version(path)) from None


def no_run(path: Path) -> str:
    """Return a message that says why a folder is not a run, and what the user should do."""
    if (path / FOLDER_OF_04).is_dir():
        return of_another_version(path)
    if any(path.glob(f"[!.]*/{STEPS}")):
        return f"{path} is not a run but contains runs; choose one of them (`ctxkv list {path}` shows them)."
    if (path / COMPARISON).is_file():
        return (
            f"{path} contains a comparison; choose one of its runs (`ctxkv list {path.parent}` shows them)."
        )
    return f"{path} does not contain a run; find runs with `ctxkv list`, or make one with `ctxkv run`."


def of_another_version(path: Path) -> str:
    return (
        f"{path} contains a run of another version of ctxkv_lib; use that version, or train again in another "
        "folder."
    )
