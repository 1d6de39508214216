"""Several processes in one run, as torchrun or `accelerate launch` starts them: plain `torch.distributed`.

Every process reads the texts and the run's folder, which all must see. Rank 0 alone holds the folder's lock,
trains Phase 1, computes the caches, writes, tests, measures and prints. Phase 2 is trained by all: each takes
its `shard` of every batch, also in validation. Losses, scores and gradients are summed (`all_reduce`), and
each draws the dropout of the whole batch, so the numbers are those of one process, up to rounding.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATIENCE = timedelta(days=2)  # that the others wait for rank 0
OTHER_ENDED = "Another process of this run has ended; what is finished is kept."
T = TypeVar("T")


class Ended(UserError):
    """Another process failed, and has printed why."""


def world_size() -> int:
    """Return the number of processes in this run."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the number of this process; only rank 0 writes into the run folder, and prints."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def join(device: "torch.device") -> None:
    """Connect with the other processes, if there are any; a UserError if there are fewer GPUs than these."""
    import torch
    from torch import distributed

    if world_size() == 1 or distributed.is_initialized():
        return
    if device.type == "cuda":
        place, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if place >= gpus:
            raise UserError(f"Process {place} has no GPU of its own, of {gpus}; start one process a GPU.")
        torch.cuda.set_device(place)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE
    )


def shard(rows: int) -> slice:
    """Return this process's shard of so many consecutive rows; the first processes may have one more."""
    least, more = divmod(rows, world_size())
    start = rank() * least + min(rank(), more)
    return slice(start, start + least + (rank() < more))


def all_reduce(tensors: Sequence["Tensor"]) -> None:
    """Overwrite contiguous tensors with their sums over all processes."""
    if world_size() > 1:
        from torch import distributed

        try:
            for exchange in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                exchange.wait()
        except RuntimeError as error:
            raise Ended(OTHER_ENDED) from error


def on_rank_0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 while the others wait, and return its result on all; its error ends all."""
    if world_size() == 1:
        return make()
    from torch import distributed

    outcome: list[Any] = [None, ""]  # what `make` returned, and its error
    try:
        if rank() == 0:
            outcome[0] = make()
    except BaseException as error:
        outcome[1] = str(error) or type(error).__name__
        raise
    finally:
        try:
            distributed.broadcast_object_list(outcome)
        except RuntimeError as error:
            raise Ended(OTHER_ENDED) from error
    if outcome[1]:
        raise Ended(outcome[1])
    return outcome[0]
