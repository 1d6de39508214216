"""Measurements of a finished run, on request; each is a stage of the run folder, of its tested weights."""

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UserError, told_in_a_sentence
from ..experiments import write_results
from ..progress import stage
from ..runs.folder import RunFolder, claimed
from ..runs.opened import Trained, open_run, refuse_other_texts
from ..runs.results import MEASUREMENTS, Run, measured
from ..runs.stages import Prepared
from . import ngrams
from . import probe as probing

MAKERS: dict[str, Callable[[Trained], dict[str, Any]]] = {"ngrams": ngrams.of_run, "probe": probing.of_run}


@told_in_a_sentence()
def measure(run: Run, names: Sequence[str] = MEASUREMENTS) -> Run:
    """Compute the missing measurements of a finished run, and write its summary and report anew.

    Args:
        names: of `MEASUREMENTS`. A mixer has no contexts to probe, which is then left out.

    Raises:
        UserError: none that applies; missing or damaged files; the user's own conversations have changed.
    """
    wanted = [name for name in names if name != "probe" or "mixer" not in run.config.plugins]
    if names and not wanted:
        raise UserError(f"{run.path} has a mixer instead of contexts to probe; it has n-grams.")
    with claimed(run.path, run.config, RunFolder.read(run.path).origin) as folder:
        key = folder.stages["test"].key
        missing = [name for name in wanted if not folder.finished(name, key)]
        if missing:
            trained = open_run(run)
            refuse_other_texts(run, "test", run.summary.get("test", {}).get("fingerprint"))
            refuse_other_texts(run, "corpus", run.summary["provenance"]["data"].get("corpus_fingerprint"))
        for name in missing:
            with stage(f"Measuring: {name}"):
                folder.finish(name, key, (), MAKERS[name](trained))
        found = measured(folder)
        if not missing and found.items() <= run.summary.items():
            return run
        summary = {name: part for name, part in run.summary.items() if name not in MEASUREMENTS}
        return write_results(run.config, folder, {**summary, **found})


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
