"""The hooks that the training loops call to save and resume, show progress, and share work among processes.

In `Loop` the hooks do nothing, so both phases can be read and run by themselves.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # `ctxkv list` imports this module and starts without torch
    from torch import Tensor

Metric = dict[str, Any]  # a line of metrics.jsonl
T = TypeVar("T")


def epochs_of(metrics: Iterable[Metric]) -> list[Metric]:
    """Select the metrics of whole epochs from the metrics of a training run."""
    return [metric for metric in metrics if "val_ppl" in metric]


class Diverged(ArithmeticError):
    """Raised if loss or weights are no longer finite; the same settings would diverge again."""


class Loop:
    """The hooks of `train_context_block`, `train_layer` and `token_scores`."""

    def restore(self, state: Any) -> None:
        """Overwrite the contents of `state` with a saved `phase2.Phase2State`, if there is one."""

    def track(self, items: Iterable[T], description: str, total: int, done: int = 0) -> Iterable[T]:
        """Return the items, and show progress as the loop goes through them, from `done` to `total`."""
        return items

    def after_round(self, state: Any, metric: Metric) -> None:
        """Handle the metrics of a finished iteration (Phase 1) or epoch (Phase 2).

        `state` is the `Phase2State` after the epoch. It is None in Phase 1, which cannot be resumed.
        """

    def after_steps(self, metric: Metric) -> None:
        """Handle the metrics of some steps within an epoch of Phase 2."""

    def shard(self, rows: int) -> slice:
        """Return the slice of a batch's rows that this process takes."""
        return slice(0, rows)

    def all_reduce(self, tensors: Sequence["Tensor"]) -> None:
        """Overwrite contiguous tensors with their sums over all processes."""
