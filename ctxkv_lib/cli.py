"""The command `ctxkv`. Slow modules are imported by the subcommands, so `ctxkv --help` answers at once."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .errors import UserError, did_you_mean, in_a_sentence, is_utf8, one_line, user_file
from .plugins.plugins import KINDS
from .progress import epoch_printer, print_on_terminal, status_line
from .runs.config import ExperimentConfig, Sampling, setting_names
from .runs.folders import comparison_folder, run_folder_of
from .runs.presets import PRESETS, RECIPES, build_config, compared_samples

EXPERIMENT = ("preset", "recipe", "data", "split", "samples", "set", *KINDS)
DATA = "your own conversations: a file, a folder of files, or a data set on the Hub"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one `ctxkv` command.

    Returns:
        The exit code: 0 after success, 2 after an error that the user can fix, 130 after Ctrl-C, and 141 if
        the output is a pipe that its reader has closed. An error in the user's own code is raised.
    """
    options = parser().parse_args(arguments)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        options.command(options)
        # Flush here, so that a write error is handled below. When the interpreter exits, it is too late.
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _fail("Stopped. Finished steps and saved epochs are kept; run again to continue.", 130)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if user_file(error):
            raise
        # Otherwise, the interpreter would try to write the rest again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141 if isinstance(error, BrokenPipeError) else _fail(in_a_sentence(error))


def _fail(message: str, code: int = 2) -> int:
    with suppress(OSError):  # stderr may be closed
        print(f"ctxkv: {one_line(message)}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors suggest the closest known name, as in "Did you mean --samples?"."""

    def parse_known_args(self, *arguments: Any) -> Any:  # type: ignore[override]
        """Refuse a subcommand's unknown options here; argparse would pass them on to the parent parser."""
        options, unknown = super().parse_known_args(*arguments)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        refused = re.search(r"'(.+?)' \(choose from (.+)\)|unrecognized arguments: ([^\s=]+)", message)
        if refused:
            word, choices, option = refused.groups()
            known = re.findall(r"[\w-]+", choices) if choices else [*self._option_string_actions]
            if "--set" in known:
                known += [f"--set {name}" for name in setting_names()]
            message += did_you_mean(word or option, known)
        super().error(message)


def _path(text: str) -> Path:
    """Convert an argument to a path, and expand `~`, which the shell does not expand in `--out=~/runs`."""
    if not text or "\0" in text or not is_utf8(text):
        raise argparse.ArgumentTypeError("a path must be UTF-8, not empty, and without a NUL character")
    return Path(os.path.expanduser(text))


def parser() -> argparse.ArgumentParser:
    """Create the parser. The parsed options have an attribute `command`, which is the function to call."""
    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    recipes = f"{', '.join(RECIPES)} (default: the preset's recipe)"
    result = Parser(prog="ctxkv", description="Train and explore Context-KV attention.")
    result.add_argument("-v", "--version", action="version", version=f"ctxkv {__version__}")
    commands = result.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[Any], None]) -> Callable[..., Any]:
        text = str(function.__doc__)
        name = function.__name__.partition("_")[0]
        subparser = commands.add_parser(name, description=text, help=text[0].lower() + text[1:-1])
        subparser.set_defaults(command=function)
        return subparser.add_argument

    def experiment(add: Callable[..., Any], many: bool = False) -> None:
        add("--preset", metavar="P", help=f"{presets} (default: colab)")
        add("--recipe", metavar="R", help=recipes)
        add("--data", metavar="X", help=f"{DATA}; split sizes that you do not set are chosen to fit")
        add("--split", metavar="NAME", help="split of a data set on the Hub (default: train)")
        add("--set", action="append", metavar="K=V", help="a setting, e.g. phase2.batch_size=256; repeatable")
        for name, kind in KINDS.items():
            add(f"--{name}", metavar="MODULE:NAME", help=kind.help)
        several = {"nargs": "+"} if many else {}
        add("--samples", type=int, metavar="N", help="number of training conversations", **several)

    def results(add: Callable[..., Any]) -> None:
        add("--out", type=_path, metavar="DIR", help="results folder (default: named after the experiment)")
        add("--measure", action="store_true", help="also compute n-gram baselines for finished runs")
        add("--again", action="store_true", help="replace a finished result even if code or data has changed")

    def as_json(add: Callable[..., Any]) -> None:
        add("--json", action="store_true", help="print JSON")

    experiment(add := command(info))
    add("--train-tokens", type=int, metavar="N", help="number of training tokens (counted with --data)")
    add("--val-tokens", type=int, metavar="N", help="number of validation tokens")
    as_json(add)
    for function in (run, compare):
        experiment(add := command(function), many=function is compare)
        results(add)
        add("--workers", type=int, metavar="N", help="number of runs at the same time (default: 1)")
        if function is run:
            add("--seeds", type=int, nargs="+", metavar="N", help="run the experiment once with each seed")
    add = command(report)
    add("run", type=_path, nargs="+", metavar="RUN", help="run folder")
    add("--lang", "--language", default="en", choices=("en", "ja"), help="language (default: en)")
    add = command(difference)
    add("run", type=_path, nargs="+", metavar="RUN", help="run folders, with any settings and seeds")
    add("--base", type=_path, nargs="+", required=True, metavar="RUN", help="run folders to compare with")
    add = command(card)
    add("run", type=_path, nargs="+", metavar="RUN", help="run folders, with any settings and seeds")
    text = "run folders to compare with (default: the first variant)"
    add("--base", type=_path, nargs="+", metavar="RUN", help=text)
    as_json(add)
    add = command(list_folders)
    add("root", type=_path, nargs="?", metavar="ROOT", help="folder to list (default: $CTXKV_RUNS, or runs)")
    as_json(add)
    add("--csv", action="store_true", help="print CSV")
    add = command(generate)
    add("run", type=_path, metavar="RUN", help="run folder")
    add("--prompt", required=True, metavar="TEXT", help="beginning of the text")
    for known in fields(Sampling):
        text = f"{known.metadata['reason']} (default: {known.default})"
        kind: Any = type(known.default)
        add(f"--{known.name.replace('_', '-')}", type=kind, default=known.default, metavar="N", help=text)
    add = command(evaluate)
    add("run", type=_path, metavar="RUN", help="run folder")
    add("--data", required=True, metavar="X", help=DATA)
    add("--split", metavar="NAME", help="split of a data set on the Hub (default: train)")
    as_json(add)
    add = command(export)
    add("run", type=_path, metavar="RUN", help="run folder")
    add("to", type=_path, nargs="?", metavar="TO", help="folder to write (default: RUN-model)")
    add = command(settings)
    add("--preset", metavar="P", help=presets)
    add("--recipe", metavar="R", help=recipes)
    for name, kind in KINDS.items():
        add(f"--{name}", metavar="MODULE:NAME", help=f"{kind.help}; its settings are listed, too")
    as_json(add)
    return result


def _parsed(pairs: Iterable[str]) -> dict[str, str]:
    """Convert `["phase2.batch_size=256"]` to `{"phase2.batch_size": "256"}`.

    Raises:
        UserError: A pair has no `=`.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair!r} has no '='; write --set group.field=value.")
        settings[key.strip()] = value.strip()
    return settings


def _config(options: argparse.Namespace, samples: int | None) -> ExperimentConfig:
    """Build the configuration from the options in `EXPERIMENT`.

    If none of these options is given and --out contains a run, return that run's configuration.
    """
    out = getattr(options, "out", None)
    if out and (out / "steps").is_dir() and not any(vars(options)[key] for key in EXPERIMENT):
        from .runs.steps import config_of

        return config_of(out)
    given = {"data.path": options.data, "data.split": options.split}
    given = {key: value for key, value in given.items() if value is not None}
    parts = {kind: part for kind in KINDS if (part := getattr(options, kind)) is not None}
    asked = _parsed(options.set or [])
    if twice := given.keys() & asked.keys():
        raise UserError(f"{min(twice)} is given by --set and by its own option; use only one of the two.")
    return build_config(options.preset or "colab", options.recipe, samples, {**asked, **given}, **parts)


def _print(values: Any, as_json: bool, as_text: Callable[[Any], str]) -> None:
    print(json.dumps(values, indent=2, default=str) if as_json else as_text(values))


def _loading() -> Any:
    return status_line("Loading torch and transformers")


def _say_where(out: Path) -> None:
    print_on_terminal(f"Working in {out}. Press Ctrl-C to stop; run the same command to continue.")


def info(options: argparse.Namespace) -> None:
    """Print parameter counts and cache sizes without a download."""
    with _loading():
        from .report.info import describe, format_info

    config = _config(options, options.samples)
    sizes = describe(config, options.train_tokens, options.val_tokens)
    _print(sizes, options.json, format_info)


def settings(options: argparse.Namespace) -> None:
    """Print every setting with its value, unit and reason."""
    from .report.info import describe_settings, format_settings

    parts = {kind: part for kind in KINDS if (part := getattr(options, kind))}
    _print(describe_settings(options.preset, options.recipe, parts), options.json, format_settings)


def list_folders(options: argparse.Namespace) -> None:
    """List all run folders with their state, differing settings, results and size."""
    from .report.tables import format_results
    from .runs.listing import describe_store, results

    table = results(options.root)
    if options.csv:
        print(table.to_csv(index_label="path"), end="")
        return
    rows = json.loads(table.rename_axis("path").reset_index().to_json(orient="records"))
    _print(rows, options.json, lambda _: "\n\n".join(filter(None, [format_results(table), describe_store()])))


def run(options: argparse.Namespace) -> None:
    """Run one experiment; run the same command again to continue, or to reuse its results."""
    config = _config(options, options.samples)
    if options.seeds or options.workers:
        _run_seeds(options, config)
        return
    with _loading():
        from .experiments import run as run_experiment

    out = options.out or run_folder_of(config)
    _say_where(out)
    finished = run_experiment(config, out, epoch_printer(config.phase2), options.again)
    best = finished.summary["phase2"]
    print(f"Best epoch {best['best_epoch']}: val PPL {best['val_ppl']:,.1f}, val acc {best['val_acc']:.1%}")
    if options.measure:
        from .report.tables import comparison_table

        print(comparison_table(_measured([finished])).to_string())
    print(f"Report: {out / 'report.md'}")


def _run_seeds(options: argparse.Namespace, config: ExperimentConfig) -> None:
    """Run an experiment with several seeds, and print a table of the results."""
    if options.out:
        raise UserError("--out names one run folder; leave it out with --seeds or --workers.")
    with _loading():
        from .parallel import run_all
        from .report.tables import format_results
        from .runs.listing import results

    seeds = options.seeds or [config.runtime.seed]
    configs = [config.replace({"runtime.seed": seed}) for seed in seeds]
    runs = run_all(configs, options.workers, again=options.again)
    print(format_results(results(_measured(runs) if options.measure else runs)))


def _measured(runs: list[Any]) -> list[Any]:
    from .measure.measurements import measure

    return [measure(finished) for finished in runs]


def compare(options: argparse.Namespace) -> None:
    """Run the same experiment with different numbers of conversations, and compare the results."""
    largest = _config(options, max(options.samples) if options.samples else None)
    counts = {*options.samples} if options.samples else compared_samples(largest)
    configs = [largest.replace({"data.samples": count}) for count in counts]
    with _loading():
        from .experiments import by_samples, write_comparison
        from .experiments import compare as compare_experiments
        from .report.tables import comparison_table

    out = options.out or comparison_folder(configs)
    _say_where(out)
    printer = epoch_printer(largest.phase2)
    runs = compare_experiments(configs, options.out, out, printer, options.again, options.workers)
    if options.measure:
        runs = _measured(runs)
        write_comparison(runs, out)
    print(comparison_table(by_samples(runs)).to_string())
    print(f"\nReport: {out / 'report.md'}\nFigures: {out / 'figures'}")


def report(options: argparse.Namespace) -> None:
    """Print the written report of one or more finished runs."""
    from .report.document import write_report
    from .runs.summary import load_run

    print(write_report([load_run(path) for path in options.run], options.lang))


def difference(options: argparse.Namespace) -> None:
    """Print how far the test perplexity of runs differs from base runs, with intervals and verdicts."""
    from .report.difference import difference, format_difference

    print(format_difference(difference(options.run, options.base)))


def card(options: argparse.Namespace) -> None:
    """Print what each variant reaches and costs: perplexity, difference, weights, memory and time."""
    with _loading():
        from .report.card import card, format_card

    table = card(options.run, options.base)
    rows = json.loads(table.rename_axis("variant").reset_index().to_json(orient="records"))
    _print(rows, options.json, lambda _: format_card(table))


def generate(options: argparse.Namespace) -> None:
    """Generate text with the model of a finished run."""
    with _loading():
        from .runs.generation import generate_text
    sampling = {known.name: getattr(options, known.name) for known in fields(Sampling)}
    print(generate_text(options.run, options.prompt, **sampling))


def evaluate(options: argparse.Namespace) -> None:
    """Measure the perplexity and accuracy of a finished run's model on other text."""
    with _loading():
        from .measure.other_text import evaluate_texts
        from .report.tables import format_scores

    scores = evaluate_texts(options.run, options.data, options.split)
    _print(scores, options.json, format_scores)


def export(options: argparse.Namespace) -> None:
    """Write the model of a finished run as a folder for transformers, with tokenizer, code and model card."""
    with _loading():
        from .report.export import export

    print(f"Exported to {export(options.run, options.to)}")
