"""Run one experiment, from loading conversations to writing the report, or run and compare several."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .data.conversations import load_conversations
from .errors import DamagedFile, UserError, friendly_errors
from .files import digest, expanded, read_json, remove, remove_leftovers, write_json, write_text
from .method.callback import Metric
from .method.memory import begin_peaks
from .plugins.checks import TRIED, try_plugins
from .plugins.source_text import source_text
from .progress import Listener, epoch_printer, format_count, log, progress_bar, status_line
from .report.document import write_report
from .report.tables import gains
from .runs.build import VECTORS, WEIGHTS, compute_table, untrained_model
from .runs.config import ExperimentConfig, require_config
from .runs.device import choose_device, choose_precision, set_threads, torch_state
from .runs.drive import kept_on_drive, restore
from .runs.folders import comparison_folder, run_folder_of
from .runs.opened import OpenRun, open_prepared
from .runs.plan import Plan
from .runs.steps import (
    COMPARISON,
    CONFIG,
    METRICS,
    OWN_PARTS,
    REPORTS,
    RESULTS,
    SUMMARY,
    RunFolder,
    claimed,
    finished,
    lock_or_refuse,
    metric_lines,
    record_settings,
    recorded_decisions,
    records,
    refuse_to_replace,
    require_same_settings,
    step,
)
from .runs.summary import Run, run_from_records
from .runs.testing import score_test
from .runs.training import STATE, train_phase2
from .store import Work, entry_folder, inputs_of


@friendly_errors()
def run(
    config: ExperimentConfig,
    out: Path | str | None = None,
    listener: Listener | None = None,
    again: bool = False,
    **plugins: Any,
) -> Run:
    """Run the unfinished steps of one experiment, and write its summary, report and figures.

    Args:
        out: run folder. The default is `run_folder_of(config)`.
        listener: function that is called with every metric in order. Metrics that an earlier call has
            computed have `"replayed": True`. With None, one line per epoch is printed, except in a notebook.
        again: replace a trained model even if code or data has changed.
        plugins: replacements for `block`, `loss` or `layer`: a class, a function, or its name `module:Name`.
            docs/own-idea.md says what each part receives and returns.

    Raises:
        UserError: The input is wrong, a data source cannot be reached, or the folder contains a different
            experiment.
    """
    with locked_run(config, out, listener, again, plugins) as (folder, plan):
        inputs, path = plan.inputs, folder.path
        step(folder, "phase2", inputs["phase2"], partial(train_phase2, plan), [WEIGHTS], STATE)
        step(folder, "test", inputs["test"], partial(score_test, plan))
        write_results(folder)
        return run_from_records(path, finished(path), plan.config)


@friendly_errors()
def prepare(
    config: ExperimentConfig,
    out: Path | str | None = None,
    listener: Listener = lambda _: None,
    again: bool = False,
    **plugins: Any,
) -> OpenRun:
    """Run Phase 1 and compute the contexts. `run` with the same arguments continues from there."""
    with locked_run(config, out, listener, again, plugins) as (folder, plan):
        return open_prepared(folder, plan)


@contextmanager
def locked_run(
    config: ExperimentConfig,
    out: Path | str | None,
    listener: Listener | None,
    again: bool,
    plugins: dict[str, Any],
) -> Iterator[tuple[RunFolder, Plan]]:
    """Read an experiment's texts, and lock its folder while the block runs.

    The folder is not touched before the plug-ins are tried and all texts are read.
    """
    require_config(config)
    config = config.with_plugins(**plugins)
    for plugin in config.plugins.values():
        plugin.require_same_code()
    device, path = choose_device(config.runtime.device), expanded(out or run_folder_of(config))
    restore(path)
    require_same_settings(path, config)
    with torch_state(config.runtime.threads):
        decisions = recorded_decisions(path) or _decide(config, device)
        plan = Plan(config, path, device, decisions["precision"])
        _try_own_plugins(config)
        _ = plan.tokens  # raises if a text cannot be used

        def contexts() -> list[Path]:
            if "phase2" in records(path) or not config.has_contexts:
                return []
            return [entry_folder("contexts", plan.inputs["contexts"])]

        listener = listener or epoch_printer(config.phase2)
        with (
            claimed(RunFolder(path, again, defaults=config.defaults())) as folder,
            kept_on_drive(path, contexts, listener) as folder.listener,
        ):
            record_settings(folder, config, decisions, partial(_write_config, config))
            set_threads(min(decisions["threads"], os.cpu_count() or 1))
            refuse_to_replace(folder, "phase2", plan.inputs["phase2"])
            begin_peaks(device)
            if table := plan.inputs.get("table"):
                compute = partial(compute_table, plan.tokens["corpus"], config)
                step(folder, "table", table, compute, [VECTORS])
            yield folder, plan


def _try_own_plugins(config: ExperimentConfig) -> None:
    """Try the user's own plug-ins on a small model. Raises UserError for a mistake."""
    if config.own_plugins:
        model = untrained_model(config, 2 * TRIED + 1, has_unigram=False)
        try_plugins(model, config.plugins)


def _decide(config: ExperimentConfig, device: torch.device) -> dict[str, Any]:
    """Decide what a run keeps when it continues, even on another machine."""
    precision = choose_precision(config.runtime.precision, device)
    return {"config": config.to_dict(), "precision": precision, "threads": torch.get_num_threads()}


def _write_config(config: ExperimentConfig, work: Work) -> dict[str, Any]:
    """Write config.json and, if it can be found, the source text of the user's own parts."""
    write_json(work.folder / CONFIG, config.to_dict())
    for kind, plugin in config.plugins.items():
        if text := source_text(plugin):
            write_text(work.folder / OWN_PARTS / f"{kind}.py", text)
    return {}


def write_results(folder: RunFolder) -> None:
    """Write a run's summary and metrics, and also the report and the figures if they are missing.

    Users may edit reports. `steps.step` deletes them before the run's numbers change.
    """
    path = folder.path
    run = run_from_records(path, finished(path))

    def compute(work: Work) -> dict[str, Any]:
        write_json(path / SUMMARY, run.summary)
        write_text(path / METRICS, metric_lines(run.metrics))
        return {}

    inputs, before = inputs_of({}, {"numbers": digest(run.summary)}), records(path).get(RESULTS)
    if step(folder, RESULTS, inputs, compute, [SUMMARY, METRICS]) == before:
        log(f"{path} is finished; its results are reused.")
    write_reports({path.name: run}, path)


@friendly_errors()
def compare(
    configs: Sequence[ExperimentConfig],
    root: Path | str | None = None,
    out: Path | str | None = None,
    listener: Listener | None = None,
    again: bool = False,
    workers: int | None = None,
) -> list[Run]:
    """Run the unfinished steps of several experiments, and write a comparison of the experiments.

    Args:
        configs: at least two experiments that differ in `data.samples`.
        root: folder that contains the run folders. The default is `$CTXKV_RUNS`, or `runs`.
        out: folder of the comparison. The default is `comparison_folder(configs, root)`.
        listener: function that is called with every metric of every run. Each metric contains its run's
            `samples`. With None, one line per epoch is printed, as in `run`.
        again: as in `run`.
        workers: number of processes, as in `run_all`. By default, the runs are trained one after another.

    Raises:
        UserError: as in `run`. This error is also raised, before anything is computed, if the data source has
            fewer conversations than the largest `samples`, or if `out` contains other files.
    """
    for config in configs:
        require_config(config)
    configs = sorted(configs, key=lambda config: config.data.samples)
    if len({config.data.samples for config in configs}) < max(2, len(configs)):
        raise UserError(
            "compare needs at least two different sample counts, such as --samples 100 500, each only once; "
            "`ctxkv report` shows runs with the same count side by side."
        )
    out = expanded(out or comparison_folder(configs, root))
    restore(out)
    _refuse_taken(out, [run_folder_of(config).name for config in configs])
    load_conversations(configs[-1].data, "train")
    listener = listener or epoch_printer(configs[-1].phase2)
    with kept_on_drive(out, lambda: [], listener) as listen:
        if workers is not None:
            _train_all(configs, workers, listen, root, again)
        runs = [
            run(config, run_folder_of(config, root), _labeled(listen, config.data.samples), again)
            for config in progress_bar(configs, "Runs of the comparison", unit="run")
        ]
        write_comparison(runs, out)
    return runs


def _train_all(
    configs: Sequence[ExperimentConfig],
    workers: int,
    listener: Listener,
    root: Path | str | None,
    again: bool,
) -> None:
    """Train the runs of a comparison in several processes."""
    from .parallel import run_all

    samples = {run_folder_of(config, root).name: config.data.samples for config in configs}

    def tell(metric: Metric) -> None:
        name = metric.pop("run")
        listener(metric | {"samples": samples[name]})

    run_all(configs, workers, tell, root, again)


def _labeled(listener: Listener, samples: int) -> Listener:
    return lambda metric: listener({**metric, "samples": samples})


def by_samples(runs: Sequence[Run]) -> dict[str, Run]:
    """Label the runs of a comparison by their numbers of conversations."""
    return {format_count(run.summary["samples"]): run for run in runs}


def _refuse_taken(out: Path, folders: list[str]) -> None:
    """Raise UserError if `out` contains anything other than a comparison of the runs in `folders`."""
    reason = "is a file" if out.is_file() else ""
    if (out / COMPARISON).is_file():
        try:
            reason = (
                "" if read_json(out / COMPARISON)["folders"] == folders else "contains another comparison"
            )
        except (DamagedFile, LookupError, TypeError):
            reason = "contains a damaged comparison"
    elif any(path.is_file() for path in out.glob("[!.]*")):
        reason = "is not empty and does not contain a comparison"
    if reason:
        raise UserError(f"{out} {reason}; choose another folder with --out.")


def write_comparison(runs: Sequence[Run], out: Path) -> None:
    """Write comparison.json, the report and the figures that compare several runs.

    If comparison.json would stay the same, existing reports and figures are not overwritten.
    """
    values = {
        "folders": [finished.path.name for finished in runs],
        "runs": [finished.summary for finished in runs],
        "improvement": gains(runs[0].summary, runs[-1].summary),
    }
    with lock_or_refuse(out):
        for pattern in (".*.part", "figures/.*.part"):
            remove_leftovers(out, pattern)
        if not (out / COMPARISON).is_file() or digest(read_json(out / COMPARISON)) != digest(values):
            for name in (*REPORTS.values(), "figures"):
                remove(out / name)
            write_json(out / COMPARISON, values)
        write_reports(by_samples(runs), out)


def write_reports(runs: Mapping[str, Run], folder: Path) -> None:
    """Write the missing reports and figures of runs. `runs` maps labels to runs."""
    with status_line("Writing report and figures"):
        for language, name in REPORTS.items():
            if not (folder / name).is_file():
                write_text(folder / name, write_report(runs, language, has_figures=True))
        summaries = {label: run.summary for label, run in runs.items()}
        phase1 = {label: run.phase1 for label, run in runs.items()}
        names = ["ppl_curves", "memory", *(["phase1"] if any(phase1.values()) else [])]
        missing = [name for name in names if not (folder / "figures" / f"{name}.png").is_file()]
        if not missing:  # importing matplotlib takes time, and a reused run does not need it
            return
        from .views import figures

        stop_rate = next(iter(runs.values())).config.phase1.stop_rate
        draw: dict[str, Callable[[], Any]] = {
            "ppl_curves": lambda: figures.ppl_curves(summaries),
            "memory": lambda: figures.memory_by_stage({n: s["memory"] for n, s in summaries.items()}),
            "phase1": lambda: figures.phase1_curves(phase1, stop_rate),
        }
        for name in missing:
            figures.save(draw[name](), folder / "figures" / f"{name}.png")
