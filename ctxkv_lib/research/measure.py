"""Measurements of a finished run, on request; each is a stage of the run folder."""

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ..data.conversations import load_conversations
from ..data.settings import DataConfig, Split
from ..errors import UserError, ended_calmly, interrupt_deferred, memory_advice
from ..experiments import write_results
from ..files import content_digest
from ..method.model import ContextKV
from ..progress import stage
from ..runs.config import ExperimentConfig
from ..runs.package_code import code_with_imports
from ..runs.records import MEASUREMENTS
from ..runs.run_folder import Run, RunFolder, refuse_damaged
from ..runs.testing import measurement_key, measurements, trained_model

READ: tuple[Split, ...] = ("train", "validation", "test")  # splits that the results of a run depend on
MAKERS: dict[str, Callable[[ExperimentConfig, RunFolder, ContextKV], dict[str, Any]]] = {
    name: import_module(f".{name}", __package__).of_run for name in MEASUREMENTS
}


@ended_calmly()
@memory_advice("Measuring the run", "close other programs that use it")
def measure(run: Run, names: Sequence[str] = MEASUREMENTS) -> Run:
    """Compute the missing measurements of a finished run, and write its summary and report anew.

    Args:
        names: of `MEASUREMENTS`. Those that do not apply to the run are left out.

    Raises:
        UserError: an unknown name; none that applies; missing or damaged caches or weights; the user's own
            file has changed.
    """
    if unknown := [name for name in names if name not in MEASUREMENTS]:
        raise UserError(f"measurement is {unknown[0]!r}; allowed: {', '.join(MEASUREMENTS)}.")
    config, possible = run.config, measurements_of(run.config)
    wanted = [name for name in names if name in possible]
    if names and not wanted:
        mixer = config.plugins["mixer"].name if "mixer" in config.plugins else "none"
        kind = f"mixer={mixer}, data.source={config.data.source}"
        raise UserError(f"{run.path} has no {' or '.join(names)} ({kind}); it has {' and '.join(possible)}.")
    refuse_damaged(run.path, "test")  # a folder that has gone is not made
    folder = RunFolder(run.path)
    with folder.claimed(config):
        keys = {name: measurement_key(folder, code_with_imports(f"research/{name}")) for name in wanted}
        missing = [name for name in wanted if not folder.finished(name, keys[name])]
        if not missing and measurements(folder).items() <= run.summary.items():
            return run
        if split := changed_split(run):
            raise UserError(
                f"The {split} conversations in {config.data.path} are not those that {run.path} was made "
                "from; restore the file, or make a new run."
            )
        folder.finished("results", "")  # as `run`
        if missing:
            for files in ("caches", "phase2"):
                refuse_damaged(run.path, files)
            model = trained_model(config, folder)
        for name in missing:
            with stage(f"Measuring: {name}"):
                folder.finish(name, keys[name], (), MAKERS[name](config, folder, model))
        summary = {name: part for name, part in run.summary.items() if name not in MEASUREMENTS}
        with interrupt_deferred():
            folder.records.remove("results")  # whose files are written anew
            return write_results(config, folder, {**summary, **measurements(folder)})


def changed_split(run: Run) -> str | None:
    """Return a split of the user's own file that is not what a run was made from; None if there is none."""
    data, test = run.summary["provenance"]["data"], run.summary.get("test", {}).get("fingerprint")
    made_from = data["train_fingerprint"], data["validation_fingerprint"], test
    splits = zip(READ, made_from, own_fingerprints(run.config.data), strict=False)
    return next((split for split, known, now in splits if known and known != now), None)


def own_fingerprints(data: DataConfig) -> list[str]:
    """Return those of all `READ` splits of the user's own file, read once while it is the same."""
    return [] if data.path is None else _read_once(data, content_digest(data.path))


@functools.cache
def _read_once(data: DataConfig, _: str) -> list[str]:
    return [load_conversations(data, split).fingerprint for split in READ]


def measurements_of(config: ExperimentConfig) -> list[str]:
    """List the measurements that apply to a run of this configuration."""
    lacking = {"probe", "ablations", "generation"} if "mixer" in config.plugins else set()
    return [name for name in MEASUREMENTS if name not in lacking]
