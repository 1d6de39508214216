"""Measurements of a finished run, on request; each is a stage of the run folder, of its tested weights."""

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UserError, told_in_a_sentence
from ..experiments import write_results
from ..progress import stage
from ..runs.device import torch_state
from ..runs.folder import RESULTS, RunFolder, claimed
from ..runs.keys import MEASUREMENTS, stage_key
from ..runs.opened import OpenRun, open_run, refuse_other_texts
from ..runs.summary import Run, finished_run, results_key
from . import ngrams
from . import probe as probing

MEASURES: dict[str, Callable[[OpenRun], dict[str, Any]]] = {"ngrams": ngrams.of_run, "probe": probing.of_run}


@told_in_a_sentence()
def measure(run: Run, names: Sequence[str] = MEASUREMENTS) -> Run:
    """Compute the missing measurements of a finished run, and write its summary and report anew.

    The probe is left out if the layer reads tokens, since there are no contexts to probe.

    Raises:
        UserError: missing or damaged files; the user's own conversations have changed.
    """
    wanted = [name for name in names if name != "probe" or run.config.reads == "contexts"]
    with claimed(run.path, run.config, RunFolder.read(run.path).origin) as folder:
        keys = {name: stage_key(name, folder, {}) for name in wanted}
        missing = [name for name in wanted if not folder.finished(name, keys[name])]
        if missing:
            opened = open_run(run)
            refuse_other_texts(run, "test", run.summary.get("test", {}).get("fingerprint"))
            refuse_other_texts(run, "corpus", run.summary["provenance"]["data"].get("corpus_fingerprint"))
        for name in missing:
            with stage(f"Measuring: {name}"), torch_state():
                folder.finish(name, keys[name], (), MEASURES[name](opened))
        if not missing and folder.finished(RESULTS, results_key(folder)):
            return finished_run(folder)
        return write_results(folder)


def probe(run: Run | OpenRun) -> dict[str, Any]:
    """Measure what contexts encode, beside untrained blocks; of a finished run also what they are worth.

    Args:
        run: finished, whose summary keeps it; or what `prepare` returns.

    Returns:
        `probe` of a summary, without `positions` and `changed` where the layer is not trained.

    Raises:
        UserError: the layer reads tokens, so there are no contexts; and as `measure`.
    """
    probed = run if isinstance(run, Run) else run.run
    if probed.config.reads == "tokens":
        raise UserError(f"The layer of {probed.path} reads tokens, so there are no contexts to probe.")
    if isinstance(run, Run):
        return {**measure(run, ["probe"]).summary["probe"]}
    with torch_state():
        return probing.encoded(run.model, run.caches)
