"""Measurements of a finished run, on request; each is a stage of the run folder, of its tested weights."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from ..errors import UserError, friendly_errors
from ..experiments import results_stage
from ..files import source_digest
from ..progress import stage
from ..runs.device import torch_state
from ..runs.driver import Stage, Work, run_stages
from ..runs.folder import claimed
from ..runs.opened import OpenRun, open_run, refuse_other_texts
from ..runs.summary import MEASUREMENTS, Run, finished_run
from . import ngrams
from . import probe as probing

CODE = {"ngrams": ("data.cooccurrence", "measure.ngrams"), "probe": ("measure.probe",)}
MEASURES: dict[str, Callable[[OpenRun], dict[str, Any]]] = {"ngrams": ngrams.of_run, "probe": probing.of_run}


@friendly_errors()
def measure(run: Run, names: Sequence[str] = MEASUREMENTS) -> Run:
    """Compute the missing measurements of a finished run, and write its summary and report anew.

    A mixer has no contexts to probe, which is then left out.

    Raises:
        UserError: missing or damaged files; the user's own conversations have changed.
    """
    opened = cache(lambda: _opened(run))

    def compute(name: str, work: Work) -> dict[str, Any]:
        with stage(f"Measuring: {name}"), torch_state():
            return MEASURES[name](opened())

    wanted = [name for name in names if name != "probe" or run.config.has_contexts]
    stages = [
        Stage(name, partial(compute, name), {"code": source_digest(*CODE[name])}, after=("test",))
        for name in wanted
    ]
    with claimed(run.path) as folder:
        finished_run(folder)
        run_stages(folder, [*stages, results_stage()], torch.device("cpu"), lambda _: None)
        return finished_run(folder)


def _opened(run: Run) -> OpenRun:
    """Open a run, after a check that its test and corpus conversations are the ones that it was made from."""
    refuse_other_texts(run, "test", run.summary.get("test", {}).get("fingerprint"))
    refuse_other_texts(run, "corpus", run.summary["provenance"]["data"].get("corpus_fingerprint"))
    return open_run(run)


def probe(run: Run | OpenRun) -> dict[str, Any]:
    """Measure what contexts encode, beside untrained blocks; of a finished run also what they are worth.

    Args:
        run: finished, whose summary keeps it; or what `prepare` returns.

    Returns:
        `probe` of a summary, without `positions` and `changed` where attention is not trained.

    Raises:
        UserError: a mixer, which has no contexts; and as `measure`.
    """
    probed = run if isinstance(run, Run) else run.run
    if not probed.config.has_contexts:
        raise UserError(f"{probed.path} has a mixer instead of contexts to probe; it has n-grams.")
    if isinstance(run, Run):
        return {**measure(run, ["probe"]).summary["probe"]}
    with torch_state():
        return probing.encoded(run.model, run.caches)
