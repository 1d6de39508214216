"""Compute the n-gram baselines of a finished run on request. This stage of the run follows the test."""

from typing import Any

import torch

from ..errors import friendly_errors
from ..experiments import results_stage
from ..files import source_digest
from ..progress import status_line
from ..runs.device import torch_state
from ..runs.driver import Stage, Work, is_finished, run_stages
from ..runs.folder import claimed
from ..runs.opened import open_run, refuse_other_texts
from ..runs.summary import NGRAMS, Run, finished_run
from . import ngrams

CODE = ("data.kneser_ney", "measure.ngrams")


@friendly_errors()
def measure(run: Run) -> Run:
    """Compute the n-gram baselines of a finished run if they are missing, and rewrite the run's results.

    Raises:
        UserError: files are missing or damaged, or the user's own conversations have changed.
    """

    def compute(work: Work) -> dict[str, Any]:
        refuse_other_texts(run, "test", run.summary.get("test", {}).get("fingerprint"))
        refuse_other_texts(run, "corpus", run.summary["provenance"]["data"].get("corpus_fingerprint"))
        with status_line("Measuring n-grams"), torch_state():
            return ngrams.of_run(open_run(run))

    stages = [Stage(NGRAMS, compute, {"code": source_digest(*CODE)}, after=("test",)), results_stage()]
    with claimed(run.path) as folder:
        finished_run(folder)
        if not is_finished(folder, stages[:1]):
            # Drop outdated n-gram baselines here, so that the driver does not drop the run's results first.
            # Without the results, the run could not be opened to compute the baselines.
            folder.drop(NGRAMS)
        run_stages(folder, stages, torch.device("cpu"), lambda _: None)
        return finished_run(folder)
