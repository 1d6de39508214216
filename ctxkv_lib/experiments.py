"""Run one experiment from conversations to report, or compare several."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from . import ranks
from .data.conversations import load_conversations
from .errors import DamagedFile, UserError, told_in_a_sentence
from .files import digest, expanded, read_json, remove, write_json, write_text
from .plugins.code_digest import method_digest
from .progress import Listener, progress_bar, stage
from .report.document import LANGUAGES, write_report
from .report.model_card import model_card
from .report.tables import gains, named
from .runs.config import ExperimentConfig, require_config
from .runs.device import choose_device, choose_precision
from .runs.experiment import Work, read_splits
from .runs.folder import COMPARISON, DEFAULT_ROOT, FOREIGN, RunFolder, Stage, claimed, only_process
from .runs.names import comparison_folder, run_folder_of
from .runs.results import Run, load_run, measured, summarize
from .runs.stages import (
    Prepared,
    context_summary,
    contexts_stages,
    load_prepared,
    model_stage,
    phase2_stage,
    test_stage,
)
from .views import figures


@told_in_a_sentence()
@torch.random.fork_rng(devices=[])
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
        listener: gets every metric in order, those of stages done earlier included.
        again: replace a finished result of other code or data.
        plugins: `block`, `loss`, `attention` or `mixer`: a class or function that replaces the method's, or
            its name `module:Name`. `ctxkv_lib.method.model.Parts` and `ctxkv_lib.plugins.mixer` describe what
            each is given and returns.

    Raises:
        UserError: bad input, an unreachable source, or a folder of another experiment.
    """
    require_config(config)
    config = config.replace(plugins) if plugins else config
    with _begun(config, out, listener, again) as work:
        phase1, caches = ranks.on_rank_0(lambda: contexts_stages(work))
        phase2 = phase2_stage(work, phase1, caches)
        return ranks.on_rank_0(lambda: _results(work, phase1, caches, phase2))


@told_in_a_sentence()
@torch.random.fork_rng(devices=[])
def prepare(
    config: ExperimentConfig,
    out: Path | str | None = None,
    listener: Listener = lambda _: None,
    again: bool = False,
    **plugins: Any,
) -> Prepared:
    """Run Phase 1 and compute the caches; `run` continues from there. Arguments as of `run`."""
    require_config(config)
    config = config.replace(plugins) if plugins else config
    with _begun(config, out, listener, again) as work:
        return load_prepared(work, *ranks.on_rank_0(lambda: contexts_stages(work)))


@contextmanager
def _begun(
    config: ExperimentConfig, out: Path | str | None, listener: Listener, again: bool
) -> Iterator[Work]:
    """Hold the experiment's folder, together with any other processes, while the block runs."""
    for plugin in config.plugins.values():
        plugin.refuse_changed()
    if ranks.world_size() > 1 and "mixer" in config.plugins:
        raise UserError("A mixer is trained in one process; start one.")
    device, threads = choose_device(config.runtime.device), torch.get_num_threads()
    texts = read_splits(config)
    origin = {
        "code": method_digest(),
        "data": digest([texts[split].fingerprint for split in sorted(texts)]),
        "precision": choose_precision(config.runtime.precision, device),
    }
    ranks.join(device)
    path = expanded(out or run_folder_of(config))
    with ExitStack() as held:
        folder = ranks.on_rank_0(lambda: held.enter_context(claimed(path, config, origin, again)))
        try:
            yield Work(config, texts, folder, device, listener)
        finally:
            torch.set_num_threads(threads)
            for plugin in config.plugins.values():
                plugin.keep_source()


def _results(work: Work, phase1: Stage, caches: Stage, phase2: Stage) -> Run:
    """Save and test a trained model, and write summary, report and figures."""
    folder = work.folder
    model_stage(work, phase2)
    test = test_stage(work, caches, phase2)
    done = folder.finished("results", test.key)
    if done and all((folder.path / name).is_file() for name in done.result["written"]):
        return load_run(folder.path)
    summary = summarize(work.config, context_summary(phase1, caches), phase2)
    if test.result:
        summary["test"] = test.result
    return write_results(work.config, folder, summary | measured(folder))


def write_results(config: ExperimentConfig, folder: RunFolder, summary: dict[str, Any]) -> Run:
    """Write summary, metrics, model card, report and figures of a run whose folder is claimed."""
    if folder.stages.pop("results", None):
        folder.write()  # so that a kill leaves no record of results that are half written
    path = folder.path
    write_json(path / "config.json", folder.config)
    write_json(path / "summary.json", summary)
    folder.write_metrics(*(folder.stages[name] for name in ("phase1", "phase2")))
    metrics = [line for name in ("phase1", "phase2") for line in folder.stages[name].metrics]
    finished = Run(path, config, summary, metrics)
    made, written = [path / name for name in ("config.json", "summary.json", "metrics.jsonl")], []
    if (path / "model").is_dir():
        written.append(path / "model" / "README.md")
        write_text(written[0], model_card(finished))
    with stage("Writing report and figures"):
        written += _publish([finished], path)
    names = [file.relative_to(path).as_posix() for file in written]  # made again if lost; yours to edit
    folder.finish("results", folder.stages["test"].key, made, {"written": names})
    return finished


@told_in_a_sentence()
def compare(
    configs: Sequence[ExperimentConfig],
    root: Path | str = DEFAULT_ROOT,
    out: Path | str | None = None,
    listener: Listener = lambda _: None,
    again: bool = False,
) -> list[Run]:
    """Run the unfinished stages of several experiments, and write their comparison.

    Args:
        configs: experiments that differ in `data.samples`, at least two.
        root: folder of the run folders.
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
    held = "is a file" if out.is_file() else ""
    if (out / COMPARISON).is_file():
        try:
            held = "" if read_json(out / COMPARISON)["folders"] == folders else "holds another comparison"
        except (DamagedFile, LookupError, TypeError):
            held = "holds a damaged comparison"
    elif {path.name for path in out.glob("[!.]*") if path.is_file()} - FOREIGN:
        held = "is not empty and holds no comparison"
    if held:
        raise UserError(f"{out} {held}; name another folder with --out.")


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
    drawn = {
        "ppl_curves": figures.ppl_curves({name: each.summary for name, each in by_name.items()}),
        "memory": figures.memory_by_stage({name: each.summary["memory"] for name, each in by_name.items()}),
    }
    phase1 = {name: each.phase1 for name, each in by_name.items()}
    if any(phase1.values()):
        drawn["phase1"] = figures.phase1_curves(phase1, runs[0].config.phase1.stop_rate)
    files = [figures.save(figure, folder / "figures" / f"{name}.png") for name, figure in drawn.items()]
    for language in LANGUAGES:
        files.append(folder / ("report.md" if language == "en" else f"report.{language}.md"))
        write_text(files[-1], write_report(runs, language, has_figures=True))
    return files
