"""Where the numbers of a training loop go while it runs."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

Metric = dict[str, Any]
Listener = Callable[[Metric], None]  # called with each line of metrics.jsonl as it is made


def progress_bar(iterable: Iterable[Any], description: str, **options: Any) -> tqdm:
    """A tqdm bar on a terminal, nothing elsewhere."""
    return tqdm(iterable, desc=description, disable=None, leave=False, dynamic_ncols=True, **options)


def say(line: str) -> None:
    """A line above the bars on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)
