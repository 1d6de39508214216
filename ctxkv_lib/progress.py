"""Progress of long work: bars and lines on a terminal, metrics for listeners."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import cache
from threading import Thread
from typing import TYPE_CHECKING, Any

from . import ranks

if TYPE_CHECKING:
    from tqdm import tqdm

REFRESH_SECONDS = 1
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
    return _bar(iterable, desc=description, dynamic_ncols=True, **options)


@contextmanager
def stage(description: str) -> Iterator[None]:
    """Show a line with a clock on a terminal, for work that has no steps to count; tell the watchers."""
    _tell_watchers(description, 0, 0)
    with _bar(desc=description, bar_format="{desc} {elapsed}"):
        yield


def _bar(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm":
    from tqdm import tqdm

    hidden = True if ranks.rank() else None  # None: tqdm shows it on a terminal only
    bar = tqdm(iterable, disable=hidden, leave=False, **options)
    if not bar.disable:
        _refresh_clocks()
    return bar


@cache
def _refresh_clocks() -> None:
    """From now on refresh the clock of every bar, also while a step takes long."""

    def refresh_forever() -> None:
        from tqdm import tqdm

        while True:
            time.sleep(REFRESH_SECONDS)
            with tqdm.get_lock():
                for bar in list(tqdm._instances):  # as tqdm's own monitor does
                    if not getattr(bar, "disable", True):  # a bar in its constructor has no attribute yet
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
    """Hide the bars of transformers, which a notebook would show for good."""
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
    """Print a line that nobody must miss, also in a log and in a notebook, which paints stderr red."""
    from tqdm import tqdm

    if not ranks.rank():
        tqdm.write(line, file=sys.stdout if in_notebook() else sys.stderr)


def in_notebook() -> bool:
    """Return whether a kernel runs this code, so that widgets can be shown."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def epoch_printer(most: int) -> Listener:
    """Return a listener that prints a line for each of at most `most` epochs, on a terminal."""
    is_first = True

    def show(metric: Metric) -> None:
        nonlocal is_first
        if metric["stage"] != "phase2":
            return
        if is_first:
            say(f"At most {most} epochs; * marks the best so far.")
        is_first = False
        samples = f"{metric['samples']} samples, " if "samples" in metric else ""
        say(
            f"{samples}epoch {metric['epoch']} of at most {most}: train PPL {metric['train_ppl']:,.1f}, "
            f"val PPL {metric['val_ppl']:,.1f}, val acc {metric['val_acc']:.1%}"
            f"{' *' if metric['improved'] else ''}"
        )

    return show
