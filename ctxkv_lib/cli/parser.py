"""The options of every command."""

import argparse
import os
from pathlib import Path
from typing import Any

from .. import __version__
from ..data.formats import FILES
from ..runs.config import PRESETS, RECIPES
from . import commands


def make_parser() -> argparse.ArgumentParser:
    """Every command with its options; `command` of what it parses is the function to call."""
    parser = argparse.ArgumentParser(prog="ctxkv", description="Train and explore Context-KV attention.")
    parser.add_argument("--version", action="version", version=f"ctxkv {__version__}")
    all_of = parser.add_subparsers(required=True, metavar="COMMAND")

    info = _command(all_of, commands.info, "sizes and parameter counts, without downloading anything")
    _add_experiment(info)
    info.add_argument("--samples", type=int, metavar="N", help="training conversations")
    info.add_argument(
        "--train-tokens", type=int, metavar="N", help="of the training stream (counted with --data)"
    )
    info.add_argument("--val-tokens", type=int, metavar="N", help="of the validation stream")
    info.add_argument("--json", action="store_true", help="print JSON")

    settings = _command(all_of, commands.settings, "every setting with its value, unit and reason")
    settings.add_argument("--preset", metavar="P", help="whose values to show (default: the defaults)")
    settings.add_argument("--json", action="store_true", help="print JSON")

    runs = _command(all_of, commands.list_folders, "all run folders: state, best PPL, what differs, size")
    runs.add_argument("root", type=Path, nargs="?", metavar="ROOT", help="(default: runs, or $CTXKV_RUNS)")
    runs.add_argument("--json", action="store_true", help="print JSON")

    run = _command(all_of, commands.run, "one experiment; run again to continue or reuse it")
    _add_experiment(run)
    run.add_argument("--samples", type=int, metavar="N", help="training conversations")
    run.add_argument("--out", type=_path, metavar="DIR", help="run folder (default: runs/PRESET-RECIPE-N)")

    compare = _command(all_of, commands.compare, "the same experiment on fewer and on more conversations")
    _add_experiment(compare)
    compare.add_argument("--samples", type=int, nargs="+", metavar="N", help="sample counts, two or more")
    compare.add_argument("--out", type=_path, metavar="DIR", help="folder of the comparison and its runs")

    sweep = _command(all_of, commands.sweep, "a grid of settings x seeds x samples; run again to go on")
    _add_experiment(sweep, nargs="+")
    sweep.set_defaults(preset=None)  # a protocol may name it
    sweep.add_argument("--samples", type=int, nargs="+", metavar="N", help="sample counts")
    sweep.add_argument("--seeds", type=int, nargs="+", metavar="N", help="(default: the preset's one)")
    sweep.add_argument("--grid", action="append", default=[], metavar="K=V,V", help="values of a setting")
    sweep.add_argument("--protocol", type=_path, metavar="FILE", help="JSON of all this, with named variants")
    sweep.add_argument("--out", type=_path, metavar="DIR", help="folder of the results")
    sweep.add_argument("--runs", type=_path, metavar="DIR", help="folder of the runs, if sweeps share it")
    sweep.add_argument("--hours", type=float, metavar="H", help="begin no run after so long")
    sweep.add_argument("--keep", action="store_true", help="keep each run's model and caches (0.2 GB a run)")

    report = _command(all_of, commands.report, "the written report of one or more finished runs")
    report.add_argument("runs", type=_path, nargs="+", metavar="RUN", help="run folder")
    report.add_argument("--lang", default="en", help="language: en or ja (default: en)")

    generate = _command(all_of, commands.generate, "text from a trained run")
    generate.add_argument("run", type=_path, metavar="RUN", help="run folder")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="how the text begins")
    generate.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="(default: 100)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest (default: 0.8)"
    )
    generate.add_argument("--top-k", type=int, default=50, metavar="K", help="(default: 50)")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")

    evaluate = _command(all_of, commands.evaluate, "perplexity and accuracy of a run on other text")
    evaluate.add_argument("run", type=_path, metavar="RUN", help="run folder")
    evaluate.add_argument("--data", type=_path, required=True, metavar="FILE", help=FILES)
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    probe = _command(all_of, commands.probe, "what a run's contexts remember, and what they are used for")
    probe.add_argument("run", type=_path, metavar="RUN", help="run folder")
    probe.add_argument("--lang", default="en", help="language: en or ja (default: en)")
    probe.add_argument("--json", action="store_true", help="print JSON")

    verify = _command(all_of, commands.verify, "every artefact of a run against its record")
    verify.add_argument("run", type=_path, metavar="RUN", help="run folder")

    bench = _command(all_of, commands.bench, "speed and memory against the original's loops and the hardware")
    _add_experiment(bench)
    bench.add_argument("--samples", type=int, metavar="N", help="conversations of the stream")
    bench.add_argument("--rounds", type=int, default=10, metavar="N", help="timed repetitions (default: 10)")
    bench.add_argument(
        "--out", type=_path, metavar="DIR", help="folder (default: runs/bench-PRESET-RECIPE-N)"
    )
    bench.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _command(all_of: Any, function: Any, summary: str) -> argparse.ArgumentParser:
    """A command named as the first word of its function's name."""
    name = function.__name__.partition("_")[0]
    parser = all_of.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
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
