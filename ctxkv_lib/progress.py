"""Progress of long work: bars and lines on a terminal, metrics for listeners."""

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from functools import cache, partial
from threading import Thread
from typing import TYPE_CHECKING, Any

from . import ranks

if TYPE_CHECKING:
    from tqdm import tqdm

REFRESH_SECONDS = 1
STDERR = 2  # its file descriptor, where bars are drawn
USUAL_COLUMNS = 80  # of a terminal
LOGGED_ITERATIONS = 10  # of Phase 1: one line for so many
INDENT = "    "  # of the rest of a line that is broken
Metric = dict[str, Any]
Listener = Callable[[Metric], None]  # called with each line of metrics.jsonl as it is made
# Called with a loop's description, its steps done and in all; 0 of 0 for work without steps.
Watcher = Callable[[str, int, int], None]
watchers: list[Watcher] = []  # those of a notebook's live view, while it is open


def progress_bar(iterable: Iterable[Any], description: str, **options: Any) -> "tqdm":
    """Return a tqdm bar, which shows on a terminal only; the watchers are called at every step."""
    if isinstance(iterable, Sized):
        options.setdefault("total", len(iterable))
    if watchers:
        iterable = _watched(iterable, description, options.get("initial", 0), options["total"])
    return _bar(iterable, desc=description, **options)


@contextmanager
def stage(description: str) -> Iterator[None]:
    """Show a line with a clock on a terminal, for work without steps, and notify the watchers."""
    _tell_watchers(description, 0, 0)
    with _bar(desc=description, bar_format="{desc} {elapsed}"):
        yield


def _bar(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm":
    from tqdm import tqdm

    hidden = True if ranks.rank() else None  # None: tqdm shows it on a terminal only
    width = None  # tqdm's own choice
    with suppress(OSError):  # not a terminal
        columns = os.get_terminal_size(STDERR).columns or USUAL_COLUMNS  # 0: it does not know
        width = columns - 1 - len("^C")  # else its echo begins a line
    bar = tqdm(iterable, disable=hidden, leave=False, ncols=width, **options)
    if not bar.disable:
        _refresh_clocks()
    return bar


@cache
def _refresh_clocks() -> None:
    """Refresh the clock of every bar from now on, also during long steps."""

    def refresh_forever() -> None:
        from tqdm import tqdm

        while True:
            time.sleep(REFRESH_SECONDS)
            with tqdm.get_lock():
                for bar in list(tqdm._instances):  # as tqdm's own monitor does
                    if not getattr(bar, "disable", True):  # a bar under construction lacks the attribute
                        bar.refresh(nolock=True)

    Thread(target=refresh_forever, daemon=True).start()


def _watched(iterable: Iterable[Any], description: str, done: int, total: int) -> Iterator[Any]:
    for item in iterable:
        _tell_watchers(description, done, total)
        yield item
        done += 1
    if total:
        _tell_watchers(description, done, total)


def _tell_watchers(description: str, done: int, total: int) -> None:
    for watcher in watchers:
        watcher(description, done, total)


@contextmanager
def transformers_bars_hidden() -> Iterator[None]:
    """Hide the bars of transformers, which would stay visible in a notebook."""
    from transformers.utils import logging

    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


def say(line: str) -> None:
    """Print a line above the bars on a terminal, and nothing elsewhere."""
    if sys.stderr.isatty():
        notice(line)


def notice(line: str) -> None:
    """Print an important line, also in a log; in a notebook on stdout, as it shows stderr in red."""
    from tqdm import tqdm

    if not ranks.rank():
        tqdm.write(line, file=sys.stdout if in_notebook() else sys.stderr)


def in_notebook() -> bool:
    """Return whether a kernel runs this code, so that widgets can be shown."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def epoch_printer(most: int, done: Collection[Metric] = ()) -> Listener:
    """Return a listener that prints a line for each of at most `most` epochs, on a terminal above the bars.

    Without a terminal, some iterations of Phase 1 get a line, too.

    Args:
        done: lines of metrics.jsonl from before; they are not printed as if they were new.
    """

    def show(metric: Metric) -> None:
        if {key: value for key, value in metric.items() if key not in ("memory", "samples")} in done:
            return
        on_terminal = sys.stderr.isatty()
        if metric["stage"] == "phase1" and (on_terminal or metric["iteration"] % LOGGED_ITERATIONS):
            return
        show_line = notice if on_terminal else partial(print, flush=True)
        show_line(in_words(metric, most))

    return show


def run_name(metric: Metric) -> str:
    """Return the name of a metric's run; empty if it has none."""
    return metric.get("run") or (counted(metric["samples"]) if "samples" in metric else "")


def in_words(metric: Metric, most: int | None = None) -> str:
    """Describe one metric in a line of text, an epoch as one of at most `most`."""
    run = f"{name}, " if (name := run_name(metric)) else ""
    if metric["stage"] == "phase1":
        return (
            f"{run}Phase 1, iteration {metric['iteration']}: loss {metric['loss']:.3f}, "
            f"{metric['convergence_rate']:.0%} of positions converged"
        )
    best = "best so far" if metric["improved"] else f"{metric['no_improve']} without improvement"
    return (
        f"{run}Phase 2, epoch {metric['epoch']}{f' of at most {most}' if most else ''}: "
        f"train PPL {metric['train_ppl']:,.1f}, val PPL {metric['val_ppl']:,.1f}, "
        f"val acc {metric['val_acc']:.1%}, {best}"
    )


def counted(count: int, unit: str = " samples") -> str:
    """Write a count with its unit, whose plural s is dropped for one."""
    return f"{count:,}{unit.removesuffix('s') if count == 1 else unit}"


def fitted(text: str) -> str:
    """Break lines wider than the terminal, and indent the rest of them."""
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    fill = partial(
        textwrap.fill, width=width, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(map(fill, text.splitlines()))
