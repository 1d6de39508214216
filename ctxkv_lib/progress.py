"""Show the progress of long tasks: bars on a terminal or in a notebook, and one line per epoch elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

    from .method.callback import Metric
    from .method.config import Phase2Config

LOGGED_ITERATIONS = 10  # iterations of Phase 1 per printed line
ESTIMATE_SECONDS = 5  # a loop's duration is estimated after this many seconds
T = TypeVar("T")
# A function that is called with each new metric. Each metric becomes one line of metrics.jsonl.
Listener = Callable[["Metric"], None]


def progress_bar(items: Iterable[Any] | None, description: str, **options: Any) -> "tqdm":
    """Return a tqdm bar. It is shown only on a terminal or in a notebook."""
    from tqdm.auto import tqdm

    is_shown = in_notebook() or sys.stderr.isatty()
    return tqdm(items, description, disable=not is_shown, leave=False, **options)


def estimated(items: Iterable[T], total: int, tell: Callable[[float], None]) -> Iterator[T]:
    """Yield the items. After a few seconds, call `tell` once with the expected seconds for `total` items.

    The first item is not timed, since it includes warm-up.
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
    """Show a status line while the block runs, for tasks without steps that could be counted."""
    with progress_bar(None, description, bar_format="{desc} ..."):
        yield


def print_on_terminal(line: str) -> None:
    """Print a line above the progress bars if stderr is a terminal."""
    if sys.stderr.isatty():
        log(line)


def log(line: str) -> None:
    """Print a line above the progress bars, to stderr or, in notebooks (where stderr is red), to stdout."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stdout if in_notebook() else sys.stderr)


def in_notebook() -> bool:
    """Return whether this code runs in a notebook's kernel, which can show widgets."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def epoch_printer(config: "Phase2Config") -> Listener:
    """Return a listener that prints one line per epoch.

    If stderr is not a terminal, the listener also prints every tenth iteration of Phase 1. It does not print
    replayed metrics. In a notebook, it prints nothing, since notebooks show progress bars.
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
    """Describe one metric in one line of text. `most` is the maximum number of epochs."""
    run = f"{name}, " if (name := run_name(metric)) else ""
    if metric["stage"] == "phase1":
        return (
            f"{run}Phase 1, iteration {metric['iteration']}: loss {metric['loss']:.3f}, "
            f"{metric['convergence_rate']:.0%} of positions converged"
        )
    epoch = f"{run}Phase 2, epoch {metric['epoch']}{f' of at most {most}' if most else ''}"
    if "step" in metric:
        return f"{epoch}, step {metric['step']:,} of {metric['steps']:,}: training loss {metric['loss']:.3f}"
    best = "best so far" if metric["improved"] else f"epochs without improvement: {metric['no_improve']}"
    return (
        f"{epoch}: train PPL {metric['train_ppl']:,.1f}, val PPL {metric['val_ppl']:,.1f}, "
        f"val acc {metric['val_acc']:.1%}, {best}"
    )


def epochs_ahead(seconds: float, least: int, most: int, usual: Sequence[int] | None = None) -> str:
    """Describe how long an epoch takes, how many epochs are possible, and how many are usual."""
    epochs = (f"{least} to " if least < most else "") + format_count(most, " epochs")
    words = f"about {duration(seconds)} per epoch, {epochs}"
    return f"{words}; this recipe usually stops after {usual[0]} to {usual[1]}" if usual else words


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours with two significant digits."""
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= 1.5 * s or s == 1)
    return f"{float(f'{seconds / size:.2g}'):,g} {unit}"


def format_count(count: int, unit: str = " samples") -> str:
    """Format a count with its unit. If the count is 1, the unit loses its plural s."""
    return f"{count:,}{unit.removesuffix('s') if count == 1 else unit}"
