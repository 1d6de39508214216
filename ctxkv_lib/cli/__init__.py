"""The `ctxkv` command: `parser` has the options, `commands` what they do, and here is how it ends."""

import io
import os
import sys
from collections.abc import Sequence

from .. import ranks
from ..errors import UserError, describe, one_line
from ..threads import wait_calmly_if_busy
from . import commands
from .parser import make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done, 1 if `verify` finds damage, 2 for what the user can fix, 130 for Ctrl-C; 141 says, as for any
    command of a pipeline, that whoever read the output has stopped reading.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    options = make_parser().parse_args(arguments)
    if ranks.index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for good: the first process speaks for all)
    wait_calmly_if_busy()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        if ranks.count() > 1 and options.command not in (commands.run, commands.compare):
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
