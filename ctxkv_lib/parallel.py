"""Run many experiments at once, in several processes of this machine or of a cluster.

joblib starts the processes (workers) and sends one experiment at a time to each of them. A worker calls
`experiments.run` and returns only its error message, if any, since its results are in the run folder. All
processes must see the same folder of runs. The calling process reads each run's `metrics.jsonl` there to show
progress and to call the listener.
"""

import json
import os
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import current_process
from pathlib import Path
from typing import Any

from .errors import UserError, friendly_errors
from .experiments import run
from .files import expanded, runs_root
from .method.callback import Metric
from .progress import Listener, in_words, log, progress_bar
from .runs.config import ExperimentConfig, require_config
from .runs.folders import run_folder_of
from .runs.steps import METRICS, STEPS, finished, records
from .runs.summary import Run, run_from_records
from .store import store

POLL_SECONDS = 0.5  # time between two looks at the metrics of all runs


@friendly_errors()
def run_all(
    configs: Sequence[ExperimentConfig],
    workers: int | None = None,
    listener: Listener | None = None,
    root: Path | str | None = None,
    again: bool = False,
    **plugins: Any,
) -> list[Run]:
    """Run experiments in several processes. Finished runs are reused; a failed run does not stop the others.

    Each worker uses its share of the CPU's cores and, if there are several GPUs, a GPU of its own. After
    Ctrl-C, the same call continues from the last saved epochs. Inside `joblib.parallel_config("dask")`, the
    workers are those of a dask cluster (docs/scale.md).

    Args:
        configs: experiments that differ in a setting, the seed or a plug-in.
        workers: number of processes. The default is 1 or, on a cluster, the number of its workers.
        listener: called with each metric, which has the name of its run folder as `run`. Metrics that an
            earlier call has computed have `"replayed": True`. With None, one line per epoch is printed if
            stderr is not a terminal.
        root: folder that contains the run folders. The default is `$CTXKV_RUNS`, or `runs`.
        again: as in `run`.
        plugins: plug-ins for all experiments, as in `run`.

    Returns:
        the runs, in the order of `configs`.

    Raises:
        UserError: `workers` is below 1, two experiments are the same, a plug-in cannot be sent to another
            process, a worker does not see the folder of runs, or a run failed.
    """
    from joblib import Parallel, delayed

    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; allowed: 1 or more.")
    for config in configs:
        require_config(config)
    configs = [config.with_plugins(**plugins) for config in configs]
    folder = expanded(root or runs_root()).absolute()
    paths = [run_folder_of(config, folder) for config in configs]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"{twice[0]} is the folder of two experiments; give each its own seed or setting.")
    if workers != 1:
        _require_sendable(configs)
    folder.mkdir(parents=True, exist_ok=True)
    shared = str(store().absolute())
    tasks = [delayed(_work)(config, path, again, shared) for config, path in zip(configs, paths, strict=True)]
    with followed(paths, configs, listener), warnings.catch_warnings():
        # joblib restarts a worker that has grown, and warns of it; the run itself is not affected.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given to the executor")
        failures = Parallel(n_jobs=workers, batch_size=1)(tasks)
    failed = {path: message for path, message in zip(paths, failures, strict=True) if message}
    if failed:
        words = "; ".join(f"{path.name}: {message}" for path, message in failed.items())
        raise UserError(f"{len(failed)} of {len(paths)} runs failed: {words}")
    return [
        run_from_records(path, finished(path), config) for config, path in zip(configs, paths, strict=True)
    ]


def _require_sendable(configs: Sequence[ExperimentConfig]) -> None:
    """Raise UserError if a plug-in cannot be sent to another process."""
    import cloudpickle

    for config in configs:
        for plugin in config.plugins.values():
            try:
                cloudpickle.dumps(plugin)
            except Exception as error:  # the user's own objects may raise anything
                raise UserError(
                    f"{plugin.name} cannot be sent to another process ({error}); leave out what cannot be "
                    "pickled, such as an open file, or use workers=1."
                ) from None


def _work(config: ExperimentConfig, path: Path, again: bool, shared: str) -> str:
    """Run one experiment in a worker, with `shared` as the store. Return "", or why it failed."""
    if not path.parent.is_dir():
        return f"the worker {current_process().name} does not see {path.parent}; use a shared folder for runs"
    if str(store().absolute()) != shared:  # in the calling process, it is that store already
        os.environ["CTXKV_CACHE"] = shared
    _use_own_gpu()
    try:
        run(config, path, lambda metric: None, again)
    except UserError as error:
        return str(error)
    except Exception as error:
        log(traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    return ""


def _use_own_gpu() -> None:
    """In a worker on a machine with several GPUs, use the one that belongs to the worker's number."""
    import torch

    number = current_process().name.rpartition("-")[2]
    if torch.cuda.device_count() > 1 and number.isdecimal():
        torch.cuda.set_device(int(number) % torch.cuda.device_count())


@contextmanager
def followed(
    paths: Sequence[Path], configs: Sequence[ExperimentConfig], listener: Listener | None
) -> Iterator[None]:
    """While the block runs, show a bar that counts finished runs, and pass all new metrics to `listener`.

    An error in the listener ends the listening and is raised when the block has ended.
    """
    ended, errors = threading.Event(), list[BaseException]()
    followers = [
        Follower(path, config.phase2.max_epochs) for path, config in zip(paths, configs, strict=True)
    ]
    bar = progress_bar(None, "Runs", total=len(paths), unit="run")
    tell = listener or (lambda metric: _print_epoch(metric) if bar.disable else None)

    def follow() -> None:
        try:
            is_last = False
            while not is_last:
                is_last = ended.wait(POLL_SECONDS)
                for follower in followers:
                    for metric in follower.new_metrics():
                        tell(metric)
                bar.n = sum(follower.is_finished for follower in followers)
                bar.set_postfix_str(", ".join(filter(None, (follower.words for follower in followers))))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        bar.close()
    if errors:
        raise errors[0]


def _print_epoch(metric: Metric) -> None:
    if "val_ppl" in metric and not metric.get("replayed"):
        print(in_words(metric), flush=True)


class Follower:
    """Reads the new lines of a run's metrics.jsonl.

    Attributes:
        is_finished: whether the run has finished. words: the run and its epoch while it trains, else "".
    """

    def __init__(self, path: Path, epochs: int) -> None:
        self.path, self.epochs, self.words = path, epochs, ""
        self.is_finished = False
        self.known, self.replayed = 0, len(self._lines())  # lines that are told; lines of an earlier call

    def _lines(self) -> list[str]:
        with suppress(OSError):
            return (self.path / METRICS).read_text(encoding="utf-8").split("\n")[:-1]
        return []

    def new_metrics(self) -> list[Metric]:
        """Return the metrics that were written since the last call, and at first those of an earlier one."""
        lines = self._lines()
        if len(lines) < self.known:  # Phase 2 has begun again
            self.known = self.replayed = 0
        metrics = [{**json.loads(line), "run": self.path.name} for line in lines[self.known :]]
        for metric in metrics[: max(0, self.replayed - self.known)]:
            metric["replayed"] = True
        self.known = len(lines)
        epochs = [metric["epoch"] for metric in metrics if "val_ppl" in metric]
        if epochs:
            self.words = f"{self.path.name}: epoch {epochs[-1]} of at most {self.epochs}"
        is_tested = (self.path / STEPS / "test.json").is_file()  # reading all records takes longer
        if not self.is_finished and is_tested and {"phase2", "test"} <= {*records(self.path)}:
            self.is_finished, self.words = True, ""
        return metrics
