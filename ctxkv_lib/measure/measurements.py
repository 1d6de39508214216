"""Measurements of a finished run on request. Each is a stage of the run folder and follows the test."""

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import told_in_a_sentence
from ..experiments import write_results
from ..progress import stage
from ..runs.device import torch_state
from ..runs.folder import RESULTS, RunFolder, claimed
from ..runs.keys import MEASUREMENTS, stage_key
from ..runs.opened import OpenRun, open_run, refuse_other_texts
from ..runs.summary import Run, finished_run, results_key
from . import ngrams

MEASURES: dict[str, Callable[[OpenRun], dict[str, Any]]] = {"ngrams": ngrams.of_run}


@told_in_a_sentence()
def measure(run: Run, names: Sequence[str] = MEASUREMENTS) -> Run:
    """Compute the missing measurements of a finished run, and write its summary and report again.

    Raises:
        UserError: missing or damaged files; the user's own conversations have changed.
    """
    with claimed(run.path, run.config, RunFolder.read(run.path).origin) as folder:
        keys = {name: stage_key(name, folder, {}) for name in names}
        missing = [name for name in names if not folder.finished(name, keys[name])]
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
