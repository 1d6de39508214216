"""The hooks that the training loops call: the one interface for what long runs need.

`Loop` adds nothing, so both phases can be read and run without anything else. `runs/long_run.py` has the one
that shows progress, saves and resumes, cuts batches when memory is full and shares them among processes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

Metric = dict[str, Any]  # a line of metrics.jsonl
T = TypeVar("T")


class Diverged(ArithmeticError):
    """A training whose loss or weights are no longer finite: the same settings would end there again."""


class Loop:
    """The hooks of `train_context_block`, `train_attention` and `token_scores`."""

    def restore(self, state: Any) -> None:
        """Continue from a saved state, if there is one: overwrite what `state` holds.

        Args:
            state: `oacd.Phase1State` or `phase2.Phase2State`.
        """

    def track(self, items: Iterable[T], description: str, total: int, done: int = 0) -> Iterable[T]:
        """Return the items, which the loop goes through one by one; show progress on the way.

        Args:
            total: how many there are, with the `done` ones that an earlier process went through.
        """
        return items

    def attempt(self, work: Callable[[], T], rows: int) -> T:
        """Return `work()`; when memory is full, repeat it with more micro-batches in `apply`, up to `rows`.

        `work` overwrites what an attempt that failed has left behind.
        """
        return work()

    def apply(self, step: Callable[..., Tensor], *parts: Any) -> Tensor:
        """Return `step(*parts)`, a row for each row of the parts, or the same from micro-batches of them.

        Args:
            step: a function whose rows depend on the same rows of the parts alone.
            parts: tensors or a batch, all of n rows.
        """
        return step(*parts)

    def backward(self, work: Callable[[Any], Tensor], batch: Any, count: int, optimizer: Any) -> Tensor:
        """Return `work(batch)`, a summed loss, whose gradients `work` adds to the weights of `optimizer`.

        When memory is full, do so in micro-batches; with several processes, sum over all of them.

        Args:
            batch: this process's shard of a batch of `count` positions.
        """
        return work(batch)

    def captured(self, step: Callable[[Any, int], Tensor], size: int) -> Callable[[Any, int], Tensor]:
        """Return `step`, a function of a batch and its size, or a version that runs full batches as a graph.

        Args:
            size: of a full batch.
        """
        return step

    def shard(self, rows: int) -> slice:
        """Return the slice of a batch's rows that this process takes."""
        return slice(0, rows)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with their sums over all processes."""

    def release(self, tensor: Tensor) -> None:
        """Free the memory that a tensor in a mapped file takes; its numbers stay in the file."""

    def after_step(self, state: Any) -> None:
        """Handle the end of an optimiser step within an epoch: save the state if it is time to."""

    def after_round(self, state: Any, metric: Metric) -> None:
        """Handle the metrics of a finished iteration (Phase 1) or epoch (Phase 2); save the state."""
