"""What a run's training loops call: metrics are recorded, and progress is shown."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ..method.callback import Callback, Metric
from ..progress import estimated, progress_bar
from ..store import Work

T = TypeVar("T")


class RunCallback(Callback):
    """Records the metrics of a training loop, and shows its progress.

    Args:
        tell: a function that is called once, after a few seconds of training, with the expected seconds for
            all steps of an epoch.
    """

    def __init__(self, work: Work, tell: Callable[[float], None] | None = None) -> None:
        self.work, self.tell = work, tell

    def track(self, items: Iterable[T], description: str, total: int, done: int = 0) -> Iterable[T]:
        bar = progress_bar(items, description, total=total, initial=done)
        tell, self.tell = self.tell, None
        return estimated(bar, total, tell) if tell else bar

    def after_round(self, state: Any, metric: Metric) -> None:
        self.work.add_metric(metric)

    def after_steps(self, metric: Metric) -> None:
        self.work.add_metric(metric)
