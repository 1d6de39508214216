"""What the training loops call to save and resume, and to show progress.

The base class `Callback` does nothing, so both phases can be read and run without other code.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

Metric = dict[str, Any]  # a line of metrics.jsonl
T = TypeVar("T")


def epochs_of(metrics: Iterable[Metric]) -> list[Metric]:
    """Return the metrics that describe whole epochs of Phase 2."""
    return [metric for metric in metrics if "val_ppl" in metric]


class Diverged(ArithmeticError):
    """Raised if the loss or the weights are no longer finite; the same settings would diverge again."""


class Callback:
    """The methods that `train_context_block`, `train_layer` and `token_scores` call."""

    def restore(self, state: Any) -> None:
        """Overwrite the contents of `state`, a `phase2.Phase2State`, if a saved state exists."""

    def track(self, items: Iterable[T], description: str, total: int, done: int = 0) -> Iterable[T]:
        """Return `items`, and show the progress from `done` to `total` while a loop iterates over them."""
        return items

    def after_round(self, state: Any, metric: Metric) -> None:
        """Handle the metrics of a finished iteration (Phase 1) or epoch (Phase 2).

        `state` is the `Phase2State` after the epoch. It is None in Phase 1, which cannot be resumed.
        """

    def after_steps(self, metric: Metric) -> None:
        """Handle the metrics of the latest steps within an epoch of Phase 2."""
