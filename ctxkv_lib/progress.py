"""Where the numbers of a training loop go while it runs."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

Metric = dict[str, Any]
Listener = Callable[[Metric], None]  # called with each line of metrics.jsonl as it is made


def progress_bar(iterable: Iterable[Any], description: str, **options: Any) -> "tqdm":
    """A tqdm bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(iterable, desc=description, disable=None, leave=False, dynamic_ncols=True, **options)


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
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)


def notice(line: str) -> None:
    """A line that nobody must miss: on a terminal, in a notebook and in a log."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
