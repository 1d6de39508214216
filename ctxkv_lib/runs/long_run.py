"""What a long training needs besides its loop: progress, a listener, several processes."""

from collections.abc import Iterable
from typing import Any, TypeVar

from .. import ranks
from ..method.loop import Loop, Metric
from ..progress import Listener, progress_bar

T = TypeVar("T")


class LongRun(Loop):
    """The hooks of a training loop in an experiment; `listener` gets every metric."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def track(self, items: Iterable[T], description: str, total: int, done: int = 0) -> Iterable[T]:
        return progress_bar(items, description, total=total, initial=done)

    def after_round(self, state: Any, metric: Metric) -> None:
        self.listener(metric)

    shard = staticmethod(ranks.shard)
    all_reduce = staticmethod(ranks.all_reduce)
