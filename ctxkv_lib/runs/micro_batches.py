"""Batches cut into micro-batches and shards, to the same numbers as whole ones."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..method.caches import Batch


class RowsOfDropout(TorchFunctionMode):
    """Inside, dropout draws the factors of a whole batch, and takes those of some of its rows.

    That is `nn.Dropout` on a tensor with a row for each position. Other dropout is the same in each part of a
    batch.

    Args:
        count: rows of the whole batch.
        rows: those that are computed inside.
    """

    def __init__(self, count: int, rows: slice) -> None:
        super().__init__()
        self.count, self.rows = count, rows

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}  # of dropout: all but the values
        if function is not F.dropout or not (named["training"] and named["p"]):
            return function(*args, **named)
        (values,) = args
        if values.shape[:1] != (self.rows.stop - self.rows.start,):  # not a row a position
            return function(*args, **named)
        whole = values.new_ones(self.count, *values.shape[1:])
        return values * F.dropout(whole, **named)[self.rows]


def in_micro_batches(step: Callable[..., Tensor], parts: Sequence[Any], micro_batches: int) -> Tensor:
    """Compute `step(*parts)` in micro-batches; backward computes them again, one by one.

    Args:
        step: see `Loop.apply`.
        parts: tensors or batches, all of n rows.
    """
    if micro_batches == 1:
        return step(*parts)
    cut = zip(*(_cut(part, micro_batches) for part in parts), strict=True)
    return torch.cat([checkpoint(step, *each, use_reentrant=False) for each in cut])


def _cut(part: Any, micro_batches: int) -> Iterable[Any]:
    if isinstance(part, Tensor):
        return part.split(-(-len(part) // micro_batches))
    return [batch for batch, _ in part.split(micro_batches)]


def summed(
    work: Callable[[Batch], Tensor], batch: Batch, count: int, rows: slice, micro_batches: int
) -> Tensor:
    """Return the sum of `work` over micro-batches, each with the dropout that the whole batch would draw.

    Args:
        work: returns a scalar on the batch's device.
        batch: these rows of a batch of `count` positions.
    """
    device = batch.targets.device
    total = torch.zeros((), device=device)
    if (micro_batches == 1 and len(batch) == count) or not isinstance(batch, Batch):
        for part, _ in batch.split(micro_batches):
            total += work(part)
        return total
    draws = random_state(device)
    for part, within in batch.split(micro_batches):
        set_random_state(device, draws)
        with RowsOfDropout(count, slice(rows.start + within.start, rows.start + within.stop)):
            total += work(part)
    return total


def random_state(device: torch.device) -> Tensor:
    """Return the state of torch's own generator of a device, which draws dropout: uint8, on the CPU."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    module.set_rng_state(state)
