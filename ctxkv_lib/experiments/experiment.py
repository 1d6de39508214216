"""One experiment from conversations to report, and several of them compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import ExperimentConfig
from ..data.conversations import load_conversations
from ..errors import UserError
from ..files import write_json, write_text
from ..model.windows import theoretical_max
from ..progress import Listener
from ..report import LANGUAGES, improvement, write_report
from ..report.model_card import model_card
from ..runs.run_folder import Run, RunFolder, load_run, run_folder_of
from ..runs.run_folder import comparison_folder as comparison_folder
from ..training.caches import dense_fp32_mib
from ..training.phase2 import best_epoch
from ..views import figures
from .measures import measure
from .stages import Prepared, Record, run_stages
from .stages import prepare as prepare_stages


def run(config: ExperimentConfig, out: Path | None = None, listener: Listener = lambda _: None) -> Run:
    """Do what is not yet done of one experiment, and write its summary, report and figures.

    Args:
        out: run folder; None takes `run_folder_of(config)`.
        listener: gets every metric in order, those of stages done earlier included.

    Raises:
        UserError: bad input, an unreachable source, or a folder of another experiment.
    """
    folder = RunFolder(out or run_folder_of(config))
    folder.claim(config)
    contexts, attention = run_stages(config, folder, listener)
    measured = measure(config, folder, attention)
    write_json(folder.summary, {**summarize(config, contexts, attention), **measured})
    finished = load_run(folder.path)
    write_text(folder.model / "README.md", model_card(finished))
    _publish([finished], folder.path)
    return finished


def prepare(
    config: ExperimentConfig, out: Path | None = None, listener: Listener = lambda _: None
) -> Prepared:
    """`run`, but only as far as the contexts: Phase 1 and the caches. `run` goes on from there."""
    folder = RunFolder(out or run_folder_of(config))
    folder.claim(config)
    return prepare_stages(config, folder, listener)


def compare(
    configs: Sequence[ExperimentConfig], root: Path, out: Path, listener: Listener = lambda _: None
) -> list[Run]:
    """Do what is not yet done of several experiments, and write their comparison.

    Args:
        configs: experiments that differ in `data.samples`, at least two.
        root: folder of the run folders.
        out: folder of the comparison.
        listener: gets every metric of every run, with the run's `samples`.

    Raises:
        UserError: as `run`; also if the largest sample count is not there, before anything is computed.
    """
    if len({config.data.samples for config in configs}) < 2:
        raise UserError("compare needs at least two different sample counts, such as --samples 100 500.")
    configs = sorted(configs, key=lambda config: config.data.samples)
    load_conversations(configs[-1].data, "train")
    runs = [run(c, run_folder_of(c, root), _labelled(listener, c.data.samples)) for c in configs]
    summaries = [finished.summary for finished in runs]
    gain = improvement(summaries[0], summaries[-1])
    write_json(out / "comparison.json", {"runs": summaries, "improvement": gain})
    _publish(runs, out)
    return runs


def _labelled(listener: Listener, samples: int) -> Listener:
    return lambda metric: listener({**metric, "samples": samples})


def summarize(config: ExperimentConfig, contexts: Record, attention: Record) -> dict[str, Any]:
    """`summary.json` from the records of both stages."""
    train_tokens, val_tokens = contexts["tokens"]["train"], contexts["tokens"]["val"]
    epochs = attention["epochs"]
    best = best_epoch(epochs)
    shown = ("epoch", "train_ppl", "val_ppl", "val_acc", "improved", "no_improve", "seconds")
    return {
        "samples": config.data.samples,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "parameters": contexts["parameters"],
        "context_window": {
            "interval": config.model.interval,
            "max_contexts": config.model.max_contexts,
            "tokens": config.model.context_window,
            "theoretical_max": theoretical_max(train_tokens, config.model.interval),
        },
        "phase1": contexts["phase1"],
        "phase2": {
            "best_epoch": best["epoch"],
            "val_ppl": best["val_ppl"],
            "val_acc": best["val_acc"],
            "train_ppl": best["train_ppl"],
            "train_val_ratio": best["val_ppl"] / best["train_ppl"],
            "stop_reason": attention["stop_reason"],
            "seconds_per_epoch": round(sum(e["seconds"] for e in epochs) / len(epochs), 3),
            "epochs": [{name: epoch[name] for name in shown} for epoch in epochs],
        },
        "memory": [*contexts["memory"], *(epoch["memory"] for epoch in epochs)],
        "caches_mib": contexts["caches_mib"],
        "caches_dense_fp32_mib": dense_fp32_mib(train_tokens, val_tokens, config.model),
        "provenance": attention["provenance"],
    }


def _publish(runs: Sequence[Run], folder: Path) -> None:
    """Report in every language, and the figures it shows."""
    summaries = [finished.summary for finished in runs]
    labels = figures.run_labels(summaries)
    phase1 = {label: finished.phase1 for label, finished in zip(labels, runs, strict=True)}
    pictures = folder / "figures"
    figures.save(figures.ppl_curves(summaries), pictures / "ppl_curves.png")
    stop_rate = runs[0].config.phase1.stop_rate
    figures.save(figures.phase1_curves(phase1, stop_rate), pictures / "phase1.png")
    figures.save(figures.memory_by_stage(summaries), pictures / "memory.png")
    for language in LANGUAGES:
        name = "report.md" if language == "en" else f"report.{language}.md"
        write_text(folder / name, write_report(runs, language))
