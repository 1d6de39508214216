"""Compute the n-gram baselines of a finished run on request. This step of the run follows the test."""

from typing import Any

from ..errors import friendly_errors
from ..experiments import write_results
from ..progress import status_line
from ..runs.device import torch_state
from ..runs.drive import kept_on_drive
from ..runs.opened import open_run
from ..runs.steps import RunFolder, claimed, finished, step
from ..runs.summary import NGRAMS, Run, run_from_records
from ..store import Work, code_inputs, inputs_of
from . import ngrams

VERSION = 1  # raise it if other code gives other perplexities


@friendly_errors()
def measure(run: Run) -> Run:
    """Compute the n-gram baselines of a finished run if they are missing, and rewrite the run's results.

    Raises:
        UserError: files are missing or damaged, or the user's own conversations have changed.
    """

    def compute(work: Work) -> dict[str, Any]:
        with status_line("Measuring n-grams"), torch_state():
            return ngrams.ngrams_of_run(open_run(run))

    with (
        claimed(RunFolder(run.path)) as folder,
        kept_on_drive(run.path, lambda: [], folder.listener),
    ):
        tested = finished(run.path, "phase2", "test")["test"].inputs
        code = code_inputs(NGRAMS, VERSION, "data.kneser_ney", "measure.ngrams")
        step(folder, NGRAMS, inputs_of({}, {}, code=code, test=tested), compute)
        write_results(folder)
        return run_from_records(run.path, finished(run.path), run.config)
