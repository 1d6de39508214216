"""Show the progress of long work: bars on a terminal or in a notebook, and one line per epoch elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from . import ranks

if TYPE_CHECKING:
    from tqdm import tqdm

    from .method.config import Phase2Config
    from .method.loop import Metric

LOGGED_ITERATIONS = 10  # iterations of Phase 1 per printed line
ESTIMATE_SECONDS = 5  # seconds of a loop after which its duration is estimated
T = TypeVar("T")
Listener = Callable[["Metric"], None]  # called with each line of metrics.jsonl as it is made


def progress_bar(items: Iterable[Any] | None, description: str, **options: Any) -> "tqdm":
    """Return a tqdm bar. It is shown only on a terminal or in a notebook."""
    from tqdm.auto import tqdm

    hidden = ranks.rank() > 0 or not (in_notebook() or sys.stderr.isatty())
    return tqdm(items, description, disable=hidden, leave=False, **options)


def estimated(items: Iterable[T], total: int, tell: Callable[[float], None]) -> Iterator[T]:
    """Yield `total` items, and call `tell` once, after some seconds, with the expected seconds for all items.

    The first item is not timed, since it warms up.
    """
    began = None
    for number, item in enumerate(items):
        if number == 1:
            began = time.monotonic()
        elif began and (seconds := time.monotonic() - began) >= ESTIMATE_SECONDS:
            tell(seconds / (number - 1) * total)
            began = None
        yield item


@contextmanager
def status_line(description: str) -> Iterator[None]:
    """Show a line while the block runs, for work that has no steps to count."""
    with progress_bar(None, description, bar_format="{desc} ..."):
        yield


def print_on_terminal(line: str) -> None:
    """Print a line above the bars if there is a terminal."""
    if sys.stderr.isatty():
        log(line)


def log(line: str) -> None:
    """Print an important line above the bars. Notebooks show stderr in red, so there it goes to stdout."""
    from tqdm import tqdm

    if not ranks.rank():
        tqdm.write(line, file=sys.stdout if in_notebook() else sys.stderr)


def in_notebook() -> bool:
    """Return whether a kernel runs this code, so that widgets can be shown."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def epoch_printer(config: "Phase2Config") -> Listener:
    """Return a listener that prints a line per epoch and, without a terminal, for some iterations of Phase 1.

    Metrics that are replayed are not printed, and nothing is printed in a notebook, which shows bars.
    """
    most = config.max_epochs

    def show(metric: "Metric") -> None:
        on_terminal = sys.stderr.isatty()
        if metric.get("replayed") or "step" in metric or in_notebook():
            return
        if metric["stage"] == "phase1" and (on_terminal or metric["iteration"] % LOGGED_ITERATIONS):
            return
        line, left = in_words(metric, most), most - metric.get("epoch", most)
        if left and metric["no_improve"] < config.patience:
            line += f"; ends in {duration(left * metric['seconds'])} at the latest"
        show_line = log if on_terminal else partial(print, flush=True)
        show_line(line)

    return show


def run_name(metric: "Metric") -> str:
    """Return the name of the run that a metric belongs to, or an empty string."""
    return metric.get("run") or (format_count(metric["samples"]) if "samples" in metric else "")


def in_words(metric: "Metric", most: int | None = None) -> str:
    """Describe one metric in a line of text; `most` is the largest possible number of epochs."""
    run = f"{name}, " if (name := run_name(metric)) else ""
    if metric["stage"] == "phase1":
        return (
            f"{run}Phase 1, iteration {metric['iteration']}: loss {metric['loss']:.3f}, "
            f"{metric['convergence_rate']:.0%} of positions converged"
        )
    epoch = f"{run}Phase 2, epoch {metric['epoch']}{f' of at most {most}' if most else ''}"
    if "step" in metric:
        return f"{epoch}, step {metric['step']:,} of {metric['steps']:,}: training loss {metric['loss']:.3f}"
    best = "best so far" if metric["improved"] else f"{metric['no_improve']} without improvement"
    return (
        f"{epoch}: train PPL {metric['train_ppl']:,.1f}, val PPL {metric['val_ppl']:,.1f}, "
        f"val acc {metric['val_acc']:.1%}, {best}"
    )


def epochs_ahead(seconds: float, least: int, most: int, usual: Sequence[int] | None = None) -> str:
    """Describe how many seconds an epoch takes, how many epochs there can be, and how many are usual."""
    words = f"an epoch about {duration(seconds)}, {f'{least} to ' if least < most else ''}{most} of them"
    return f"{words}; this recipe usually stops after {usual[0]} to {usual[1]}" if usual else words


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours with two significant digits."""
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= 1.5 * s or s == 1)
    return f"{float(f'{seconds / size:.2g}'):,g} {unit}"


def format_count(count: int, unit: str = " samples") -> str:
    """Format a count with its unit, without the plural s if the count is 1."""
    return f"{count:,}{unit.removesuffix('s') if count == 1 else unit}"
