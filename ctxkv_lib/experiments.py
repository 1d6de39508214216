"""Run one experiment, from loading conversations to writing the report, or run and compare several."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from . import ranks
from .data.conversations import load_conversations
from .errors import DamagedFile, UserError, friendly_errors
from .files import expanded, read_json, remove, write_json, write_text
from .method.memory import begin_peaks
from .progress import Listener, epoch_printer, log, progress_bar, status_line
from .report.document import LANGUAGES, write_report
from .report.model_card import model_card
from .report.tables import gains, runs_by_name
from .runs.config import ExperimentConfig, require_config
from .runs.device import choose_device, precision_of_run, torch_state
from .runs.driver import (
    Stage,
    Work,
    is_finished,
    prepare_folder,
    replay,
    require_same_settings,
    run_stages,
)
from .runs.folder import COMPARISON, MODEL, RESULTS, SETTINGS, RunFolder, claimed, locked
from .runs.inputs import Inputs, read_splits
from .runs.names import comparison_folder, run_folder_of
from .runs.opened import OpenRun, open_prepared
from .runs.presets import with_fitting_sizes
from .runs.records import as_json
from .runs.stages import experiment_stages, settings_stage, write_model
from .runs.summary import NGRAMS, TRAININGS, Run, finished_run, summarize

CARD = f"{MODEL}/README.md"


class Claimed(NamedTuple):
    """An experiment whose folder is locked by this process."""

    folder: RunFolder
    inputs: Inputs
    stages: list[Stage]


@friendly_errors()
def run(
    config: ExperimentConfig,
    out: Path | str | None = None,
    listener: Listener | None = None,
    again: bool = False,
    save_model: bool = True,
    **plugins: Any,
) -> Run:
    """Run the unfinished stages of one experiment, and write its summary, report and figures.

    Args:
        out: run folder. The default is `run_folder_of(config)`.
        listener: function that is called with every metric in order. The metrics of reused stages have
            `"replayed": True`. With None, one line per epoch is printed, except in a notebook.
        again: replace a finished result even if code or data has changed, and check all files of the run.
        save_model: write the folder `model/`, which transformers can load. A later call can still write it.
        plugins: replacements for `block`, `loss` or `layer`: a class, a function, or its name `module:Name`.
            docs/own-idea.md says what each part receives and returns.

    Raises:
        UserError: The input is wrong, a data source cannot be reached, or the folder contains a different
            experiment.
    """
    with claimed_experiment(config, out, again, plugins, save_model) as (folder, inputs, stages):
        listener = listener or epoch_printer(config.phase2)
        if not again and ranks.on_rank_0(lambda: is_finished(folder, stages)):
            log(f"{folder.path} is finished; its results are reused.")
            for stage_record in folder.records.values():
                replay(stage_record, listener)
        else:
            run_stages(folder, stages, inputs.device, listener, again)
        return ranks.on_rank_0(lambda: finished_run(folder))


@friendly_errors()
def prepare(
    config: ExperimentConfig,
    out: Path | str | None = None,
    listener: Listener = lambda _: None,
    again: bool = False,
    **plugins: Any,
) -> OpenRun:
    """Run Phase 1 and compute the context caches. `run` with the same arguments continues from there."""
    with claimed_experiment(config, out, again, plugins) as (folder, inputs, stages):
        contexts = [stage.name for stage in stages].index("contexts")
        run_stages(folder, stages[: contexts + 1], inputs.device, listener, again)
        return open_prepared(folder, inputs)


@contextmanager
def claimed_experiment(
    config: ExperimentConfig,
    out: Path | str | None,
    again: bool,
    plugins: dict[str, Any],
    save_model: bool = True,
) -> Iterator[Claimed]:
    """Lock an experiment's folder for this process while the block runs, and yield its inputs and stages."""
    require_config(config)
    config = config.replace(plugins)
    for plugin in config.plugins.values():
        plugin.require_same_code()
    if ranks.world_size() > 1 and config.reads == "tokens":
        raise UserError("A layer that reads tokens cannot be trained in several processes; start just one.")
    config = with_fitting_sizes(config)
    device = choose_device(config.runtime.device)
    ranks.join(device)
    path = expanded(out or run_folder_of(config))
    with torch_state(config.runtime.threads), ExitStack() as lock:
        folder = ranks.on_rank_0(lambda: lock.enter_context(claimed(path, again)))
        require_same_settings(folder, [settings_stage(config)])
        precision = precision_of_run(folder, config.runtime.precision, device)
        inputs = Inputs(config, read_splits(config), device, precision)
        stages = [*experiment_stages(inputs), results_stage(), model_stage(inputs, save_model)]
        ranks.on_rank_0(lambda: prepare_folder(folder, stages, again))
        begin_peaks(device)
        try:
            yield Claimed(folder, inputs, stages)
        finally:
            for plugin in config.plugins.values():
                plugin.keep_code()


def results_stage() -> Stage:
    """Return the stage that writes summary, report and figures from the numbers of the other stages."""
    return Stage(
        RESULTS,
        write_results,
        {},
        after=(SETTINGS, *TRAININGS, "test", NGRAMS),
        files=("summary.json", "metrics.jsonl"),
        editable=("report.md", "report.ja.md", "figures", CARD),
        is_from_results=True,
    )


def write_results(work: Work) -> dict[str, Any]:
    """Write the summary and the metrics, and also the report, figures and model card if they are missing."""
    folder, path = work.folder, work.folder.path
    finished = Run(path, folder.config, summarize(folder), folder.metrics(TRAININGS))
    write_json(path / "summary.json", finished.summary)
    folder.write_metrics(TRAININGS)
    _write_card(finished)
    with status_line("Writing report and figures"):
        _publish([finished], path, only_missing=True)
    return {}


def model_stage(inputs: Inputs, save_model: bool) -> Stage:
    """Return the last stage of a run. This stage saves the model for transformers, with a model card."""

    def compute(work: Work) -> dict[str, Any]:
        write_model(inputs, work.folder.path)
        _write_card(finished_run(work.folder))
        return {}

    return Stage(
        MODEL,
        compute,
        {"code of saved models": inputs.digests["code of saved models"]},
        after=("phase2",),
        files=("model",),
        editable=(CARD,),
        is_replaceable=True,
        is_left_out=not save_model,
    )


def _write_card(finished: Run) -> None:
    """Write the model card if the run has a saved model without a card."""
    card = finished.path / CARD
    if card.parent.is_dir() and not card.is_file():
        write_text(card, model_card(finished))


@friendly_errors()
def compare(
    configs: Sequence[ExperimentConfig],
    root: Path | str | None = None,
    out: Path | str | None = None,
    listener: Listener | None = None,
    again: bool = False,
    save_model: bool = True,
) -> list[Run]:
    """Run the unfinished stages of several experiments, and write a comparison of the experiments.

    Args:
        configs: at least two experiments that differ in `data.samples`.
        root: folder that contains the run folders. The default is `$CTXKV_RUNS`, or `runs`.
        out: folder of the comparison. The default is `comparison_folder(configs, root)`.
        listener: function that is called with every metric of every run. Each metric contains its run's
            `samples`. With None, one line per epoch is printed, as in `run`.
        again, save_model: as in `run`.

    Raises:
        UserError: as in `run`. This error is also raised, before anything is computed, if the data source has
            fewer conversations than the largest `samples`, or if `out` contains other files.
    """
    for config in configs:
        require_config(config)
    configs = sorted(map(with_fitting_sizes, configs), key=lambda config: config.data.size("train"))
    if len({config.data.samples for config in configs}) < 2:
        raise UserError(
            "compare needs at least two different sample counts, such as --samples 100 500; `ctxkv report` "
            "shows runs with the same count side by side."
        )
    out = expanded(out or comparison_folder(configs, root))
    _refuse_taken(out, [run_folder_of(config).name for config in configs])
    load_conversations(configs[-1].data, "train")
    listener = listener or epoch_printer(configs[-1].phase2)
    runs = [
        run(config, run_folder_of(config, root), _labelled(listener, config.data.samples), again, save_model)
        for config in progress_bar(configs, "Runs of the comparison", unit="run")
    ]
    ranks.on_rank_0(lambda: write_comparison(runs, out))
    return runs


def _labelled(listener: Listener, samples: int) -> Listener:
    return lambda metric: listener({**metric, "samples": samples})


def _refuse_taken(out: Path, folders: list[str]) -> None:
    """Raise UserError if `out` contains anything other than a comparison of the runs in `folders`."""
    reason = "is a file" if out.is_file() else ""
    if (out / COMPARISON).is_file():
        try:
            reason = "" if read_json(out / COMPARISON)["folders"] == folders else "holds another comparison"
        except (DamagedFile, LookupError, TypeError):
            reason = "holds a damaged comparison"
    elif any(path.is_file() for path in out.glob("[!.]*")):
        reason = "is not empty and holds no comparison"
    if reason:
        raise UserError(f"{out} {reason}; name another folder with --out.")


def write_comparison(runs: Sequence[Run], out: Path) -> None:
    """Write comparison.json, the report and the figures that compare several runs.

    If comparison.json would stay the same, existing reports and figures are not overwritten.
    """
    values = {
        "folders": [finished.path.name for finished in runs],
        "runs": [finished.summary for finished in runs],
        "improvement": gains(runs[0].summary, runs[-1].summary),
    }
    is_same = (out / COMPARISON).is_file() and read_json(out / COMPARISON) == as_json(values)
    with locked(out), status_line("Writing report and figures"):
        for leftover in [*out.glob(".*.part"), *out.glob("figures/.*.part")]:  # left by a killed process
            remove(leftover)
        write_json(out / COMPARISON, values)
        _publish(runs, out, only_missing=is_same)


def _publish(runs: Sequence[Run], folder: Path, only_missing: bool = False) -> None:
    """Write the report of runs in every language, and its figures.

    Args:
        only_missing: do not overwrite existing files, since users may have edited them.
    """
    # Importing matplotlib takes time, and a reused run does not need it.
    from .views import figures

    by_name = runs_by_name(runs)
    summaries = {name: run.summary for name, run in by_name.items()}
    phase1 = {name: run.phase1 for name, run in by_name.items()}
    pictures = {
        "ppl_curves": lambda: figures.ppl_curves(summaries),
        "memory": lambda: figures.memory_by_stage({name: s["memory"] for name, s in summaries.items()}),
    }
    if any(phase1.values()):
        pictures["phase1"] = lambda: figures.phase1_curves(phase1, runs[0].config.phase1.stop_rate)
    for name, draw in pictures.items():
        file = folder / "figures" / f"{name}.png"
        if not (only_missing and file.is_file()):
            figures.save(draw(), file)
    for language in LANGUAGES:
        file = folder / ("report.md" if language == "en" else f"report.{language}.md")
        if not (only_missing and file.is_file()):
            write_text(file, write_report(runs, language, has_figures=True))
