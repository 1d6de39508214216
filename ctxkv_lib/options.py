"""Options of the `ctxkv` command and their parser."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .data.formats import FILES
from .errors import did_you_mean, is_utf8
from .runs.config import PRESETS, RECIPES
from .runs.settings import Sampling


def _path(text: str) -> Path:
    """Return the path of an argument; the shell does not expand `~` in `--out=~/runs`."""
    if not text or "\0" in text or not is_utf8(text):
        raise argparse.ArgumentTypeError("a path must be UTF-8, not empty, and without a NUL character")
    return Path(os.path.expanduser(text))


_presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
_recipes = f"{' or '.join(RECIPES)} (default: the preset's own)"
_data = f"your own conversations: {FILES}; sizes that are not given fit it"
_out = "run folder, or folder of the results (default: named after the experiment, in runs or $CTXKV_RUNS)"


def _sampling(field: Field) -> dict[str, Any]:
    text = f"{field.metadata['reason']} (default: {field.default})"
    return {"type": type(field.default), "default": field.default, "metavar": "N", "help": text}


PLUG_INS = {
    "block": "a ContextBlock of your own",
    "loss": "a Phase 1 loss of your own",
    "attention": "what Phase 2 trains",
    "mixer": "what predicts instead of contexts, attention and feed-forward",
}

# Arguments of `add_argument`, by name; a suffix distinguishes other forms of the same option.
OPTIONS: dict[str, dict[str, Any]] = {
    "run": {"type": _path, "metavar": "RUN", "help": "run folder"},
    "run+": {"type": _path, "nargs": "+", "metavar": "RUN", "help": "run folder"},
    "root": {"type": _path, "nargs": "?", "metavar": "ROOT", "help": "(default: runs, or $CTXKV_RUNS)"},
    "--preset": {"default": "colab", "metavar": "P", "help": f"{_presets} (default: colab)"},
    "--preset?": {"metavar": "P", "help": _presets},
    "--recipe": {"metavar": "R", "help": _recipes},
    "--data": {"metavar": "FILE", "help": _data},
    "--data!": {"type": _path, "required": True, "metavar": "FILE", "help": FILES},
    "--columns": {"metavar": "NAMES", "help": "the file's columns, as data.columns"},
    "--set": {
        "action": "append",
        "default": [],
        "metavar": "K=V",
        "help": "a setting, phase2.batch_size=256; repeatable",
    },
    **{f"--{name}": {"metavar": "MODULE:NAME", "help": text} for name, text in PLUG_INS.items()},
    "--samples": {"type": int, "metavar": "N", "help": "training conversations"},
    "--samples+": {"type": int, "nargs": "+", "metavar": "N", "help": "training conversations of each run"},
    "--out": {"type": _path, "metavar": "DIR", "help": _out},
    "--measure": {
        "action": "store_true",
        "help": "also measure the runs: n-grams, probe of contexts",
    },
    "--again": {"action": "store_true", "help": "replace a result of other code, or without its record"},
    "--train-tokens": {"type": int, "metavar": "N", "help": "of the training stream (counted with --data)"},
    "--val-tokens": {"type": int, "metavar": "N", "help": "of the validation stream"},
    "--prompt": {"required": True, "metavar": "TEXT", "help": "how the text begins"},
    **{f"--{f.name.replace('_', '-')}": _sampling(f) for f in fields(Sampling)},
    "--lang": {"default": "en", "choices": ("en", "ja"), "help": "language (default: en)"},
    "--json": {"action": "store_true", "help": "print JSON"},
}

Command = Callable[[argparse.Namespace], int | None]
COMMANDS: dict[Command, str] = {}


def command(options: str) -> Callable[[Command], Command]:
    """Register a function as a command, named by its first word, with these keys of `OPTIONS`."""

    def add(function: Command) -> Command:
        COMMANDS[function] = options
        return function

    return add


def _names(function: Command) -> tuple[str, list[str]]:
    """Return the name of a command, and those of its arguments."""
    return function.__name__.partition("_")[0], [key.rstrip("+?!") for key in COMMANDS[function].split()]


class Parser(argparse.ArgumentParser):
    """A parser whose errors suggest the closest name."""

    known: Sequence[str] = ()  # names that may be misspelled

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.+?)'|unrecognized arguments: (\S+)", message)
        super().error(message + (did_you_mean(found[1] or found[2], self.known) if found else ""))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; `command` of the result is the function to call."""
    parser = Parser(prog="ctxkv", description="Train and explore Context-KV attention.")
    parser.add_argument("-v", "--version", action="version", version=f"ctxkv {__version__}")
    parser.known = [_names(function)[0] for function in COMMANDS]
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, keys in COMMANDS.items():
        (name, known), text = _names(function), str(function.__doc__)
        own = parsers.add_parser(name, description=text, help=f"{text[0].lower()}{text[1:-1]}")
        own.known = known
        own.set_defaults(command=function, parser=own)
        for argument, key in zip(known, keys.split(), strict=True):
            own.add_argument(argument, **OPTIONS[key])
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options
