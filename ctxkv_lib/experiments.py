"""Run one experiment from conversations to report, or compare several."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from . import ranks
from .data.conversations import load_conversations
from .errors import DamagedFile, Diverged, Stopped, UserError, ended_calmly
from .files import expanded, read_json, sweep, write_json, write_text
from .locks import only_process
from .method import loop
from .progress import Listener, progress_bar, stage
from .report.document import LANGUAGES, write_report
from .report.info import context_window, dense_fp32_mib
from .report.model_card import model_card
from .report.tables import gains
from .runs.config import ExperimentConfig
from .runs.differences import run_names
from .runs.plugins import refuse_changed
from .runs.provenance import choose_device
from .runs.records import SummaryPart
from .runs.run_folder import (
    COMPARISON,
    DEFAULT_ROOT,
    FOREIGN,
    Run,
    RunFolder,
    comparison_folder,
    read_run,
    run_folder_of,
)
from .runs.stages import Prepared, run_stages
from .runs.stages import prepare as prepare_stages
from .runs.testing import measurements, test
from .runs.work import Texts, Work, read_texts
from .views import figures
from .views.figures import save


@ended_calmly()
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
        again: replace a finished result of other code, or without its record.
        plugins: `block`, `loss`, `attention`, `mixer` or `optimizer`: a class or function that replaces the
            method's, or its name `module:Name`. `ctxkv_lib.method.model.Parts`, `ctxkv_lib.runs.rows`
            (mixers) and `ctxkv_lib.method.phase2.Stepper` describe what each is given and returns.

    Raises:
        UserError: bad input, an unreachable source, or a folder of another experiment.
    """
    config = config.replace(plugins) if plugins else config
    with _begun(config, read_texts(config), out, listener, again) as work:
        folder = work.folder
        folder.finished("results", "")  # says so if one of its files is lost, before all are written anew
        contexts, attention = run_stages(work)
        del work  # with the memory of its model: the test loads another
        return ranks.on_rank_0(lambda: _results(config, folder, contexts, attention))


@ended_calmly()
@torch.random.fork_rng(devices=[])
def prepare(
    config: ExperimentConfig,
    out: Path | str | None = None,
    listener: Listener = lambda _: None,
    again: bool = False,
    **plugins: Any,
) -> Prepared:
    """Run Phase 1 and compute the caches; `run` continues from there."""
    config = config.replace(plugins) if plugins else config
    with _begun(config, read_texts(config), out, listener, again) as work:
        return prepare_stages(work)


@contextmanager
def _begun(
    config: ExperimentConfig, texts: Texts, out: Path | str | None, listener: Listener, again: bool
) -> Iterator[Work]:
    """Hold the experiment's folder, together with any other processes, while the block runs."""
    for plugin in config.plugins.values():
        refuse_changed(plugin)
    if ranks.world_size() > 1 and "mixer" in config.plugins:
        raise UserError("A mixer is trained in one process; start one.")
    ranks.join(choose_device(config.runtime.device))
    folder, threads = RunFolder(out or run_folder_of(config)), torch.get_num_threads()
    try:
        with folder.claimed(config, again):
            yield Work(config, texts, folder, (lambda _: None) if ranks.rank() else listener)
    except KeyboardInterrupt:
        done = 0
        with suppress(DamagedFile, TypeError, LookupError):  # of lines that are written anew
            done = sum(line["stage"] == "phase2" for line in folder.metric_lines())
        kept = {0: "Finished stages are", 1: "Epoch 1 is"}.get(done, f"Epochs 1 to {done} are")
        raise Stopped(kept) from None
    except loop.Diverged as error:
        raise Diverged(f"{error} Use a new run folder.") from error
    finally:
        torch.set_num_threads(threads)


def _results(
    config: ExperimentConfig, folder: RunFolder, contexts: SummaryPart, attention: SummaryPart
) -> Run:
    """Test a trained run, and write summary, report and figures."""
    summary = summarize(config, contexts, attention)
    if found := test(config, folder):
        summary["test"] = found
    return write_results(config, folder, summary | measurements(folder))


def write_results(config: ExperimentConfig, folder: RunFolder, summary: SummaryPart) -> Run:
    """Write configuration, summary, model card, report and figures of a run whose folder is claimed."""
    write_json(folder.config, config.to_dict())
    write_json(folder.summary, summary)
    finished = read_run(folder.path, config)
    made = [folder.config, folder.metrics_file, folder.summary]
    if folder.model.is_dir():
        made.append(folder.model / "README.md")
        write_text(made[-1], model_card(finished))
    with stage("Writing report and figures"):
        made += _publish([finished], folder.path)
    folder.finish("results", "", made)
    return finished


@ended_calmly()
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
    configs = sorted(configs, key=lambda config: config.data.samples)
    if len({config.data.samples for config in configs}) < 2:
        raise UserError(
            "compare needs at least two different sample counts, such as --samples 100 500; `ctxkv report` "
            "and `ctxkv sweep` show runs of one count side by side."
        )
    out = expanded(out or comparison_folder(configs, root))
    _refuse_taken(out, configs)
    load_conversations(configs[-1].data, "train")
    runs = [
        run(config, run_folder_of(config, root), _labelled(listener, config.data.samples), again)
        for config in progress_bar(configs, "Runs of the comparison", unit="run")
    ]
    ranks.on_rank_0(lambda: write_comparison(runs, out))
    return runs


def _refuse_taken(out: Path, configs: Sequence[ExperimentConfig]) -> None:
    """Refuse a folder whose files a comparison of these experiments must not overwrite."""
    names = [run_folder_of(config).name for config in configs]
    held = "is a file" if out.is_file() else ""
    beside = [path.name for at in ("", "figures") for path in (out / at).glob("[!.]*") if path.is_file()]
    if RunFolder(out).holds_run():
        held = "holds a run"
    elif COMPARISON in beside:
        try:
            found = read_json(out / COMPARISON)
            is_same = [summary["samples"] for summary in found["runs"]] == [c.data.samples for c in configs]
            is_same &= found.get("folders", names) == names
        except DamagedFile:
            is_same = True  # it is written anew
        except (AttributeError, KeyError, TypeError):
            is_same = False
        held = "" if is_same else "holds another comparison"
    elif set(beside) - FOREIGN:
        held = "is not empty and holds no comparison"
    if held:
        raise UserError(f"{out} {held}; name another folder with --out.")


def write_comparison(runs: Sequence[Run], out: Path) -> None:
    """Write comparison.json, report and figures of several runs."""
    summaries = [finished.summary for finished in runs]
    improvement = gains(summaries[0], summaries[-1])
    with only_process(out), stage("Writing report and figures"):
        sweep(out, deep=False)  # the run folders below may be in use
        sweep(out / "figures")
        names = [finished.path.name for finished in runs]
        write_json(out / COMPARISON, {"folders": names, "runs": summaries, "improvement": improvement})
        _publish(runs, out)


def _labelled(listener: Listener, samples: int) -> Listener:
    return lambda metric: listener({**metric, "samples": samples})


def summarize(config: ExperimentConfig, contexts: SummaryPart, attention: SummaryPart) -> dict[str, Any]:
    """Make the content of `summary.json` from the records of both stages."""
    train_tokens, val_tokens = contexts["tokens"]["train"], contexts["tokens"]["val"]
    epochs = attention["epochs"]
    best = next(line for line in reversed(epochs) if line["improved"])
    shown = ("epoch", "train_ppl", "val_ppl", "val_acc", "improved", "no_improve", "seconds")
    return {
        "samples": config.data.samples,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "parameters": attention["parameters"],
        "context_window": {**context_window(config.model, train_tokens), "offsets": attention["offsets"]},
        "phase1": contexts["phase1"],
        "phase2": {
            "best_epoch": best["epoch"],
            **{name: best[name] for name in ("val_ppl", "val_acc", "train_ppl")},
            "train_val_ratio": best["val_ppl"] / best["train_ppl"],
            "stop_reason": attention["stop_reason"],
            "seconds_per_epoch": round(sum(e["seconds"] for e in epochs) / len(epochs), 3),
            "epochs": [{name: epoch[name] for name in shown} for epoch in epochs],
        },
        "memory": [*contexts["memory"], *attention["memory"], *(epoch["memory"] for epoch in epochs)],
        "caches_mib": contexts["caches_mib"],
        "caches_dense_fp32_mib": dense_fp32_mib(train_tokens, val_tokens, config.model),
        "provenance": attention["provenance"],
    }


def _publish(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the report in every language, and its figures; return the files."""
    named = dict(zip(run_names(runs), runs, strict=True))
    phase1 = {name: finished.phase1 for name, finished in named.items()}
    drawn = {
        "ppl_curves": figures.ppl_curves({name: finished.summary for name, finished in named.items()}),
        "memory": figures.memory_by_stage({n: finished.summary["memory"] for n, finished in named.items()}),
    }
    if any(phase1.values()):
        drawn["phase1"] = figures.phase1_curves(phase1, runs[0].config.phase1.stop_rate)
    files = [save(each, folder / "figures" / f"{name}.png") for name, each in drawn.items()]
    for language in LANGUAGES:
        files.append(folder / ("report.md" if language == "en" else f"report.{language}.md"))
        write_text(files[-1], write_report(runs, language, has_figures=True))
    return files
