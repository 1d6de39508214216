"""Measurements of a finished run, on request; each is a stage of the run folder beside its test."""

from collections.abc import Sequence
from typing import Any

from ..data.conversations import load_conversations
from ..errors import UserError, ended_calmly, interrupt_deferred, memory_advice
from ..experiments import write_results
from ..progress import stage
from ..runs.package_code import code_with_imports
from ..runs.records import MEASUREMENTS
from ..runs.run_folder import Run, RunFolder, refuse_damaged
from ..runs.stages import Prepared
from ..runs.testing import measurement_key, measurements, trained_model
from . import ngrams
from . import probe as probing

MAKERS = {"ngrams": ngrams.of_run, "probe": probing.of_run}


@ended_calmly()
@memory_advice("Measuring the run", "close other programs that use it")
def measure(run: Run, names: Sequence[str] = MEASUREMENTS) -> Run:
    """Compute the missing measurements of a finished run, and write its summary and report anew.

    Args:
        names: of `MEASUREMENTS`. A mixer has no contexts to probe, which is then left out.

    Raises:
        UserError: an unknown name; none that applies; missing or damaged caches or weights; the user's own
            file has changed.
    """
    if unknown := [name for name in names if name not in MEASUREMENTS]:
        raise UserError(f"measurement is {unknown[0]!r}; allowed: {', '.join(MEASUREMENTS)}.")
    config = run.config
    wanted = [name for name in names if name != "probe" or "mixer" not in config.plugins]
    if names and not wanted:
        raise UserError(f"{run.path} has a mixer instead of contexts to probe; it has n-grams.")
    refuse_damaged(run.path, "test")  # a folder that has gone is not made
    folder = RunFolder(run.path)
    with folder.claimed(config):
        keys = {name: measurement_key(folder, code_with_imports(f"measure/{name}")) for name in wanted}
        missing = [name for name in wanted if not folder.finished(name, keys[name])]
        if not missing and measurements(folder).items() <= run.summary.items():
            return run
        made_from = run.summary.get("test", {}).get("fingerprint")
        if made_from not in (None, load_conversations(config.data, "test").fingerprint):
            raise UserError(
                f"The test conversations in {config.data.path} are not those that {run.path} was made from; "
                "restore the file, or make a new run."
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


def probe(made: Run | Prepared) -> dict[str, Any]:
    """Measure what contexts encode, beside untrained blocks; of a finished run also what they are worth.

    Args:
        made: a finished run, whose summary keeps it, or one whose contexts are computed.

    Returns:
        `probe` of a summary, without `positions` and `changed` where attention is not trained.

    Raises:
        UserError: as `measure`.
    """
    if isinstance(made, Prepared):
        return probing.encoded(made.model, made.caches)
    return {**measure(made, ["probe"]).summary["probe"]}
