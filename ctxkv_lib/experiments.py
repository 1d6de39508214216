"""Run one experiment from conversations to report, or compare several."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from . import ranks
from .data.conversations import load_conversations
from .errors import DamagedFile, UserError, told_in_a_sentence
from .files import digest, expanded, read_json, remove, source_digest, write_json, write_text
from .method.memory import begin_peaks
from .progress import Listener, progress_bar, stage
from .report.document import LANGUAGES, write_report
from .report.model_card import model_card
from .report.tables import gains, named
from .runs.config import ExperimentConfig, require_config
from .runs.device import choose_device, choose_precision, torch_state
from .runs.experiment import Experiment, read_splits
from .runs.folder import COMPARISON, OF_SYSTEM, RESULTS, RunFolder, claimed, only_process
from .runs.keys import RESULT_CODE
from .runs.names import comparison_folder, run_folder_of
from .runs.opened import OpenRun, open_prepared
from .runs.stages import contexts_stages, model_stage, phase2_stage, test_stage
from .runs.summary import Run, finished_run, results_key, summarize
from .views import figures


@told_in_a_sentence()
def run(
    config: ExperimentConfig,
    out: Path | str | None = None,
    listener: Listener = lambda _: None,
    again: bool = False,
    **plugins: Any,
) -> Run:
    """Run the unfinished stages of one experiment, and write its summary, report and figures.

    Args:
        out: run folder; None takes `run_folder_of(config)`.
        listener: gets every metric in order; those of stages done earlier, too, with `"replayed": True`.
        again: replace a finished result of other code or data.
        plugins: `block`, `loss` or `layer`: a class or function that replaces the method's, or its name
            `module:Name`. docs/own-idea.md says what each is given and returns.

    Raises:
        UserError: bad input, an unreachable source, or a folder of another experiment.
    """
    with claimed_experiment(config, out, listener, again, plugins) as experiment:
        contexts_stages(experiment)
        phase2_stage(experiment)
        return ranks.on_rank_0(lambda: _finish(experiment))


@told_in_a_sentence()
def prepare(
    config: ExperimentConfig,
    out: Path | str | None = None,
    listener: Listener = lambda _: None,
    again: bool = False,
    **plugins: Any,
) -> OpenRun:
    """Run Phase 1 and compute the caches; `run` continues from there. Arguments as of `run`."""
    with claimed_experiment(config, out, listener, again, plugins) as experiment:
        contexts_stages(experiment)
        return open_prepared(experiment)


@contextmanager
def claimed_experiment(
    config: ExperimentConfig, out: Path | str | None, listener: Listener, again: bool, plugins: dict[str, Any]
) -> Iterator[Experiment]:
    """Keep an experiment's folder for this process, and those it works with, while the block runs."""
    require_config(config)
    config = config.replace(plugins)
    for plugin in config.plugins.values():
        plugin.refuse_changed()
    if ranks.world_size() > 1 and config.reads == "tokens":
        raise UserError("A layer that reads tokens is trained in one process; start one.")
    device = choose_device(config.runtime.device)
    texts = read_splits(config)
    origin = {
        "code": source_digest(*RESULT_CODE),
        "data": digest([texts[split].fingerprint for split in sorted(texts)]),
        "precision": choose_precision(config.runtime.precision, device),
    }
    ranks.join(device)
    path = expanded(out or run_folder_of(config))
    with torch_state(config.runtime.threads), ExitStack() as lock:
        folder = ranks.on_rank_0(lambda: lock.enter_context(claimed(path, config, origin, again)))
        begin_peaks(device)
        try:
            yield Experiment(folder, texts, device, listener)
        finally:
            for plugin in config.plugins.values():
                plugin.keep_code()


def _finish(experiment: Experiment) -> Run:
    """Save and test a trained model, and write summary, report and figures."""
    folder = experiment.folder
    model_stage(experiment)
    test_stage(experiment)
    results = folder.finished(RESULTS, results_key(folder))
    if results and all((folder.path / name).is_file() for name in results.result["written"]):
        return finished_run(folder)
    return write_results(folder)


def write_results(folder: RunFolder) -> Run:
    """Write summary, metrics, model card, report and figures of a run whose folder is claimed."""
    if folder.stages.pop(RESULTS, None):
        folder.write()  # so that a kill leaves no record of results that are half written
    path = folder.path
    finished = Run(path, folder.config, summarize(folder), folder.metrics())
    write_json(path / "config.json", folder.config.to_dict())
    write_json(path / "summary.json", finished.summary)
    folder.write_metrics()
    numbers, texts = [path / name for name in ("config.json", "summary.json", "metrics.jsonl")], []
    if (path / "model").is_dir():
        texts.append(path / "model" / "README.md")
        write_text(texts[0], model_card(finished))
    with stage("Writing report and figures"):
        texts += _publish([finished], path)
    names = [file.relative_to(path).as_posix() for file in texts]  # made again if lost; yours to edit
    folder.finish(RESULTS, results_key(folder), numbers, {"written": names})
    return finished


@told_in_a_sentence()
def compare(
    configs: Sequence[ExperimentConfig],
    root: Path | str | None = None,
    out: Path | str | None = None,
    listener: Listener = lambda _: None,
    again: bool = False,
) -> list[Run]:
    """Run the unfinished stages of several experiments, and write their comparison.

    Args:
        configs: experiments that differ in `data.samples`, at least two.
        root: folder of the run folders; None takes `$CTXKV_RUNS`, or `runs`.
        out: folder of the comparison; None takes `comparison_folder(configs, root)`.
        listener: gets every metric of every run, with the run's `samples`.
        again: as of `run`.

    Raises:
        UserError: as `run`; also if the largest sample count is not there, or `out` holds something else,
            before anything is computed.
    """
    for config in configs:
        require_config(config)
    configs = sorted(configs, key=lambda config: config.data.samples)
    if len({config.data.samples for config in configs}) < 2:
        raise UserError(
            "compare needs at least two different sample counts, such as --samples 100 500; `ctxkv report` "
            "shows runs of one count side by side."
        )
    out = expanded(out or comparison_folder(configs, root))
    _refuse_taken(out, [run_folder_of(config).name for config in configs])
    load_conversations(configs[-1].data, "train")
    runs = [
        run(config, run_folder_of(config, root), _labelled(listener, config.data.samples), again)
        for config in progress_bar(configs, "Runs of the comparison", unit="run")
    ]
    ranks.on_rank_0(lambda: write_comparison(runs, out))
    return runs


def _labelled(listener: Listener, samples: int) -> Listener:
    return lambda metric: listener({**metric, "samples": samples})


def _refuse_taken(out: Path, folders: list[str]) -> None:
    """Refuse a folder whose files a comparison of the runs in `folders` must not overwrite."""
    reason = "is a file" if out.is_file() else ""
    if (out / COMPARISON).is_file():
        try:
            reason = "" if read_json(out / COMPARISON)["folders"] == folders else "holds another comparison"
        except (DamagedFile, LookupError, TypeError):
            reason = "holds a damaged comparison"
    elif {path.name for path in out.glob("[!.]*") if path.is_file()} - OF_SYSTEM:
        reason = "is not empty and holds no comparison"
    if reason:
        raise UserError(f"{out} {reason}; name another folder with --out.")


def write_comparison(runs: Sequence[Run], out: Path) -> None:
    """Write comparison.json, report and figures of several runs."""
    values = {
        "folders": [finished.path.name for finished in runs],
        "runs": [finished.summary for finished in runs],
        "improvement": gains(runs[0].summary, runs[-1].summary),
    }
    with only_process(out), stage("Writing report and figures"):
        for leftover in [*out.glob(".*.part"), *out.glob("figures/.*.part")]:  # of a killed process
            remove(leftover)
        write_json(out / COMPARISON, values)
        _publish(runs, out)


def _publish(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the report in every language, and its figures; return the files."""
    by_name = named(runs)
    summaries = {name: run.summary for name, run in by_name.items()}
    pictures = {
        "ppl_curves": figures.ppl_curves(summaries),
        "memory": figures.memory_by_stage({name: s["memory"] for name, s in summaries.items()}),
    }
    phase1 = {name: run.phase1 for name, run in by_name.items()}
    if any(phase1.values()):
        pictures["phase1"] = figures.phase1_curves(phase1, runs[0].config.phase1.stop_rate)
    files = [figures.save(figure, folder / "figures" / f"{name}.png") for name, figure in pictures.items()]
    for language in LANGUAGES:
        files.append(folder / ("report.md" if language == "en" else f"report.{language}.md"))
        write_text(files[-1], write_report(runs, language, has_figures=True))
    return files
