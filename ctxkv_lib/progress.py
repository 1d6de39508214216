"""Where the numbers of a training loop go while it runs."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from . import ranks
from .errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm

REFRESH_SECONDS = 1
Metric = dict[str, Any]
Listener = Callable[[Metric], None]  # called with each line of metrics.jsonl as it is made
Watcher = Callable[[str, int, int], None]  # called with a loop's description, its steps done and in all
watchers: list[Watcher] = []  # those of a notebook's live view, while it is open


def progress_bar(iterable: Iterable[Any], description: str, **options: Any) -> "tqdm":
    """A tqdm bar on a terminal, nothing elsewhere; the watchers hear of every step."""
    from tqdm import tqdm

    if isinstance(iterable, Sized):
        options.setdefault("total", len(iterable))
    if watchers:
        iterable = _watched(iterable, description, options.get("initial", 0), options["total"])
    options = {"desc": description, "disable": _hidden(), "leave": False, "dynamic_ncols": True, **options}
    return _moving(tqdm(iterable, **options))


@contextmanager
def stage(description: str) -> Iterator[None]:
    """A line with a clock on a terminal while something goes on that has no steps to count."""
    from tqdm import tqdm

    with _moving(tqdm(desc=description, bar_format="{desc} {elapsed}", disable=_hidden(), leave=False)):
        yield


def _hidden() -> bool | None:
    """Whether a bar is not shown; None leaves it to tqdm, which shows it on a terminal."""
    return True if ranks.index() else None


def _moving(bar: "tqdm") -> "tqdm":
    if not bar.disable:
        _keep_moving()
    return bar


@cache
def _keep_moving() -> None:
    """From now on the clock of every bar goes on, also while a step takes long."""
    Thread(target=_refresh_forever, daemon=True).start()


def _refresh_forever() -> None:
    from tqdm import tqdm

    while True:
        time.sleep(REFRESH_SECONDS)
        with tqdm.get_lock():
            for bar in list(tqdm._instances):  # as tqdm's own monitor does
                if not getattr(bar, "disable", True):  # one that is being made has none yet
                    bar.refresh(nolock=True)


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
    """Without the bars of transformers, which a notebook would show for good."""
    from transformers.utils import logging

    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


def say(line: str) -> None:
    """A line above the bars on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        notice(line)


def notice(line: str) -> None:
    """A line that nobody must miss: on a terminal, in a notebook (which paints stderr red) and in a log."""
    from tqdm import tqdm

    if not ranks.index():
        tqdm.write(line, file=sys.stdout if in_notebook() else sys.stderr)


def in_notebook() -> bool:
    """Whether a kernel runs this code, and widgets can be shown."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def refuse_missing_tracker(name: str) -> None:
    """Raise a UserError if `runtime.tracker` needs what is not installed."""
    if name == "none":
        return
    try:
        from accelerate.tracking import get_available_trackers

        found = [tracker.value for tracker in get_available_trackers()]
    except ImportError:
        found = []
    if name not in found:
        raise UserError(
            f"runtime.tracker is {name!r}, for which something is missing here; `pip install accelerate "
            f"{name}`, or set runtime.tracker=none: metrics.jsonl has the same."
        )


@contextmanager
def tracked(name: str, folder: Path, settings: dict[str, Any], listener: Listener) -> Iterator[Listener]:
    """A listener that hands each metric on, with its numbers to a tracker first (`runtime.tracker`)."""
    if name == "none" or ranks.index():
        yield listener
        return
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # what trackers log with asks for it
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": str(folder / "tracker")} if kind.requires_logging_directory else {}
    tracker = kind(folder.name, **place)
    tracker.start()
    tracker.store_init_configuration({key: str(value) for key, value in settings.items()})
    steps = count(1)  # trackers want them to rise; iteration and epoch are among the numbers

    def hear(metric: Metric) -> None:
        numbers = {key: float(value) for key, value in metric.items() if isinstance(value, int | float)}
        tracker.log({f"{metric['stage']}/{key}": value for key, value in numbers.items()}, next(steps))
        listener(metric)

    try:
        yield hear
    finally:
        tracker.finish()


def epoch_printer(most: int) -> Listener:
    """On a terminal, a line for each epoch, `most` at most, above the progress bar."""
    said = False

    def show(metric: Metric) -> None:
        nonlocal said
        if metric["stage"] != "phase2":
            return
        if not said:
            say(f"At most {most} epochs; * marks those that are the best so far.")
            said = True
        run = f"{metric['samples']} samples, " if "samples" in metric else ""
        say(
            f"{run}epoch {metric['epoch']} of at most {most}: train PPL {metric['train_ppl']:,.1f}, "
            f"val PPL {metric['val_ppl']:,.1f}, val acc {metric['val_acc']:.1%}"
            f"{' *' if metric['improved'] else ''}"
        )

    return show
