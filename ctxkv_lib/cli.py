"""The `ctxkv` command: parses, calls, prints. Heavy imports wait until a command needs them."""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, ranks
from .config import PRESETS, RECIPES, ExperimentConfig, parse_settings
from .data.sources.formats import FILES
from .errors import UserError, describe, memory_advice, one_line
from .progress import epoch_printer, notice, say, stage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done, 1 if `verify` finds damage, 2 for what the user can fix, 130 for Ctrl-C; 141 says, as for any
    command of a pipeline, that whoever read the output has stopped reading.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    options = _parser().parse_args(arguments)
    if ranks.index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for good: the first process speaks for all)
    # Read when torch loads: on a busy machine OpenMP's threads would spin away each other's time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        if ranks.count() > 1 and options.command not in (_run, _compare):
            raise UserError("Only run and compare work in several processes; start this command by itself.")
        code = options.command(options) or 0
        sys.stdout.flush()  # here, since what fails at the interpreter's exit cannot be answered
        return code
    except KeyboardInterrupt:
        return _fail(
            "Stopped. Finished stages and epochs are kept; the same command goes on from there.", 130
        )
    except BrokenPipeError:
        _drop_output()
        return 141
    except ranks.Ended as error:
        return 2 if ranks.index() else _fail(str(error))
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        _drop_output()
        return _fail(describe(error))


def _fail(message: str, code: int = 2) -> int:
    line = one_line(message)
    if ranks.is_first_to_say(line):
        print(f"ctxkv: {line}", file=sys.stderr)
    return code


def _drop_output() -> None:
    """Send what could not be written nowhere, or the interpreter would try, and complain, once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ctxkv", description="Train and explore Context-KV attention.")
    parser.add_argument("--version", action="version", version=f"ctxkv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = _command(commands, "info", _info, "sizes and parameter counts, without downloading anything")
    _add_experiment(info)
    info.add_argument("--samples", type=int, metavar="N", help="training conversations")
    info.add_argument("--train-tokens", type=int, metavar="N", help="tokens of the training stream")
    info.add_argument("--val-tokens", type=int, metavar="N", help="tokens of the validation stream")
    info.add_argument("--json", action="store_true", help="print JSON")

    settings = _command(commands, "settings", _settings, "every setting with its value, unit and reason")
    settings.add_argument("--preset", metavar="P", help="whose values to show (default: the defaults)")
    settings.add_argument("--json", action="store_true", help="print JSON")

    runs = _command(commands, "list", _list, "all run folders: state, best PPL, what differs, size")
    runs.add_argument("root", type=Path, nargs="?", metavar="ROOT", help="(default: runs, or $CTXKV_RUNS)")
    runs.add_argument("--json", action="store_true", help="print JSON")

    run = _command(commands, "run", _run, "one experiment; run again to continue or reuse it")
    _add_experiment(run)
    run.add_argument("--samples", type=int, metavar="N", help="training conversations")
    run.add_argument("--out", type=_path, metavar="DIR", help="run folder (default: runs/PRESET-RECIPE-N)")

    compare = _command(
        commands, "compare", _compare, "the same experiment on fewer and on more conversations"
    )
    _add_experiment(compare)
    compare.add_argument("--samples", type=int, nargs="+", metavar="N", help="sample counts, two or more")
    compare.add_argument("--out", type=_path, metavar="DIR", help="folder of the comparison and its runs")

    sweep = _command(commands, "sweep", _sweep, "a grid of settings x seeds x samples; run again to go on")
    _add_experiment(sweep, nargs="+")
    sweep.set_defaults(preset=None)  # a protocol may name it
    sweep.add_argument("--samples", type=int, nargs="+", metavar="N", help="sample counts")
    sweep.add_argument("--seeds", type=int, nargs="+", metavar="N", help="(default: the preset's one)")
    sweep.add_argument("--grid", action="append", default=[], metavar="K=V,V", help="values of a setting")
    sweep.add_argument("--protocol", type=_path, metavar="FILE", help="JSON of all this, with named variants")
    sweep.add_argument("--out", type=_path, metavar="DIR", help="folder of the results and the runs")
    sweep.add_argument("--hours", type=float, metavar="H", help="begin no run after so long")
    sweep.add_argument("--keep", action="store_true", help="keep each run's model and caches (0.2 GB a run)")

    report = _command(commands, "report", _report, "the written report of one or more finished runs")
    report.add_argument("runs", type=_path, nargs="+", metavar="RUN", help="run folder")
    report.add_argument("--lang", default="en", help="language: en or ja (default: en)")

    generate = _command(commands, "generate", _generate, "text from a trained run")
    generate.add_argument("run", type=_path, metavar="RUN", help="run folder")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="how the text begins")
    generate.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="(default: 100)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest (default: 0.8)"
    )
    generate.add_argument("--top-k", type=int, default=50, metavar="K", help="(default: 50)")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")

    evaluate = _command(commands, "evaluate", _evaluate, "perplexity and accuracy of a run on other text")
    evaluate.add_argument("run", type=_path, metavar="RUN", help="run folder")
    evaluate.add_argument("--data", type=_path, required=True, metavar="FILE", help=FILES)
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    probe = _command(commands, "probe", _probe, "what a run's contexts remember, and what they are used for")
    probe.add_argument("run", type=_path, metavar="RUN", help="run folder")
    probe.add_argument("--lang", default="en", help="language: en or ja (default: en)")
    probe.add_argument("--json", action="store_true", help="print JSON")

    verify = _command(commands, "verify", _verify, "every artefact of a run against its record")
    verify.add_argument("run", type=_path, metavar="RUN", help="run folder")

    bench = _command(
        commands, "bench", _bench, "speed and memory against the original's loops and the hardware"
    )
    _add_experiment(bench)
    bench.add_argument("--samples", type=int, metavar="N", help="conversations of the stream")
    bench.add_argument("--rounds", type=int, default=10, metavar="N", help="timed repetitions (default: 10)")
    bench.add_argument(
        "--out", type=_path, metavar="DIR", help="folder (default: runs/bench-PRESET-RECIPE-N)"
    )
    bench.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _command(commands: Any, name: str, function: Any, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(command=function)
    return parser


def _path(text: str) -> Path:
    """A path as typed; the shell leaves `~` alone in `--out=~/runs`."""
    if "\0" in text:
        raise argparse.ArgumentTypeError("a path cannot hold a NUL character")
    return Path(os.path.expanduser(text))


def _add_experiment(parser: argparse.ArgumentParser, **recipe: Any) -> None:
    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    parser.add_argument("--preset", default="colab", metavar="P", help=f"{presets} (default: colab)")
    recipes = f"{' or '.join(RECIPES)} (default: the preset's own)"
    parser.add_argument("--recipe", metavar="R", help=recipes, **recipe)
    parser.add_argument(
        "--data", metavar="FILE", help=f"your own conversations: {FILES}; sizes that are not given fit it"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="K=V", help="any setting, e.g. phase2.batch_size=256"
    )


def _config(
    options: argparse.Namespace, samples: int | None, tell: Callable[[str], None] = say
) -> ExperimentConfig:
    """The experiment that is asked for; `tell` gets a line on how a file of one's own is split."""
    from .data.sources.local_files import configure

    return configure(options.preset, options.recipe, samples, _given(options), tell)


def _given(options: argparse.Namespace) -> dict[str, str]:
    return {**({"data.path": options.data} if options.data else {}), **parse_settings(options.set)}


def _info(options: argparse.Namespace) -> None:
    from .report.info import describe, format_info

    facts = describe(_config(options, options.samples), options.train_tokens, options.val_tokens)
    print(json.dumps(facts, indent=2) if options.json else format_info(facts))


def _settings(options: argparse.Namespace) -> None:
    from .report.settings import describe_settings, format_settings

    rows = describe_settings(options.preset)
    print(json.dumps(rows, indent=2) if options.json else format_settings(rows))


def _list(options: argparse.Namespace) -> None:
    from .runs.listing import format_runs, list_runs
    from .runs.run_folder import DEFAULT_ROOT

    runs = list_runs(options.root or DEFAULT_ROOT)
    as_json = json.dumps([vars(run) for run in runs], indent=2, default=str)
    print(as_json if options.json else format_runs(runs))


def _run(options: argparse.Namespace) -> None:
    config = _config(options, options.samples, notice)
    from .runs.run_folder import run_folder_of

    out = options.out or run_folder_of(config)
    _announce(out)
    with stage("Loading torch and transformers"):
        from .experiments.experiment import run

    finished = run(config, out, epoch_printer(config.phase2.max_epochs))
    best = finished.summary["phase2"]
    print(f"Best epoch {best['best_epoch']}: val PPL {best['val_ppl']:.1f}, val acc {best['val_acc']:.1%}")
    print(f"Report: {out / 'report.md'}")


def _compare(options: argparse.Namespace) -> None:
    from .data.sources.local_files import compared_samples

    largest = _config(options, max(options.samples) if options.samples else None, notice)
    counts = options.samples or compared_samples(largest)
    configs = [largest.replace({"data.samples": count}) for count in counts]
    from .runs.run_folder import DEFAULT_ROOT, comparison_folder

    out = options.out or comparison_folder(configs)
    _announce(out)
    with stage("Loading torch and transformers"):
        from .experiments.experiment import compare
        from .report import comparison_table

    runs = compare(configs, options.out or DEFAULT_ROOT, out, epoch_printer(largest.phase2.max_epochs))
    print(comparison_table([finished.summary for finished in runs]))
    print(f"\nReport: {out / 'report.md'}\nFigures: {out / 'figures'}")


def _sweep(options: argparse.Namespace) -> None:
    from .experiments.protocol import asked_for, cells_of, sweep_name
    from .runs.run_folder import DEFAULT_ROOT

    cells = cells_of(asked_for(options.protocol, vars(options), _given(options)), notice)
    out = options.out or DEFAULT_ROOT / sweep_name(cells, options.protocol)
    _announce(out)
    with stage("Loading torch and transformers"):
        from .experiments.sweep import format_outcomes, sweep

    outcomes = sweep(cells, out, out, hours=options.hours, keep=options.keep)
    print(f"{format_outcomes(outcomes)}\n\nWritten: {out / 'sweep.md'}")


def _report(options: argparse.Namespace) -> None:
    from .report import write_report
    from .runs.run_folder import load_run

    print(write_report([load_run(path) for path in options.runs], options.lang))


@memory_advice("Generating", "lower --max-new-tokens")
def _generate(options: argparse.Namespace) -> None:
    with stage("Loading the model"):
        from .runs.inference import generate_text, load_trained
        from .runs.provenance import choose_device

        model, tokenizer = load_trained(options.run, choose_device("auto"))
    sampling = (options.max_new_tokens, options.temperature, options.top_k, options.seed)
    print(generate_text(model, tokenizer, options.prompt, *sampling))


@memory_advice("Evaluation", "evaluate a file with fewer conversations")
def _evaluate(options: argparse.Namespace) -> None:
    from .data.conversations import read_conversations
    from .files import write_json

    conversations = read_conversations(options.data)
    with stage("Loading the model"):
        from .runs.inference import evaluate_texts, evaluation_file, format_scores, load_trained
        from .runs.provenance import choose_device
        from .views.axes import save
        from .views.figures import ppl_by_reading

        model, tokenizer = load_trained(options.run, choose_device("auto"))
    made_from = {"file": options.data.name, "fingerprint": conversations.fingerprint}
    with stage("Reading the text"):
        scores = {**made_from, **evaluate_texts(model, tokenizer, list(conversations.texts()))}
    out = evaluation_file(options.run, options.data, conversations.fingerprint)
    picture = out.with_suffix(".png")
    write_json(out, scores)
    save(ppl_by_reading(scores), picture)
    print(json.dumps(scores, indent=2) if options.json else format_scores(scores))
    if not options.json:
        print(f"\nWritten: {out}, {picture}")


def _probe(options: argparse.Namespace) -> None:
    with stage("Reading the contexts"):
        from .experiments.experiment import probe_run
        from .report.measured import format_ablations, format_probe
        from .runs.run_folder import load_run

        run = load_run(options.run)
        found, written = probe_run(run)
    tables = [
        format_probe(found["probe"], run.config.model, options.lang),
        format_ablations(found["ablations"], options.lang),
    ]
    print(json.dumps(found, indent=2) if options.json else "\n\n".join(tables))
    if written and not options.json:
        print(f"\nWritten: {', '.join(map(str, written))}")


def _verify(options: argparse.Namespace) -> int:
    from .memory import mib
    from .report.tables import terminal_table
    from .runs.verification import verify

    found = verify(options.run)
    rows = [[each.stage, each.name, f"{mib(each.num_bytes):,.2f}", each.state] for each in found.artefacts]
    print(terminal_table([["Stage", "File", "MiB", "State"], *rows]))
    if found.unfinished:
        print(f"Not finished: {', '.join(found.unfinished)}")
    print("All is intact." if found.intact else f"Make again what is not intact with {found.cure}.")
    return 0 if found.intact else 1


@memory_advice("The benchmark", "lower --samples")
def _bench(options: argparse.Namespace) -> None:
    config = _config(options, options.samples)
    from .runs.run_folder import run_folder_of

    run_folder = run_folder_of(config)
    out = options.out or run_folder.with_name(f"bench-{run_folder.name}")
    _announce(out)
    with stage("Loading torch and transformers"):
        from .bench import bench, bench_table

    results = bench(config, run_folder, out, options.rounds)
    print(json.dumps(results, indent=2) if options.json else bench_table(results))
    if not options.json:
        print(f"\nWritten: {out / 'bench.json'}, {out / 'bench.png'}")


def _announce(out: Path) -> None:
    """On a terminal, a first line at once: imports and the token table take some seconds."""
    say(f"Working in {out}. Ctrl-C stops; the same command goes on.")
