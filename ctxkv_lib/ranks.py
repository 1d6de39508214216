"""Run one experiment in several processes that communicate through `torch.distributed`.

torchrun or `accelerate launch` starts the processes. Every process reads the texts and the run folder, so all
of them need access to both. The module `experiments` connects the processes, and rank 0 locks the folder.

In most stages, only rank 0 computes and records results: `runs.driver` calls `on_rank_0`, and the other
processes wait for the record. Only Phase 2, the stage with `Stage.is_collective`, is computed by all
processes. Each process takes its `shard` of every batch in training (`ContextKV.batches`) and of all
positions in validation (`scoring.token_scores`). Losses, scores and gradients are summed over the processes
(`all_reduce`), and each process draws the dropout mask of the whole batch (`phase2.ShardedDropout`). The
results therefore equal the results of a single process up to rounding. The training loops call `shard` and
`all_reduce` through the hooks in `runs.training.RunHooks`.

In `progress` and `cli`, only rank 0 prints. Layers that read tokens can only be trained in one process.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Environment variables that a launcher sets for each process. Some clusters also set a few of these variables
# for every program, so only the complete set shows that a launcher started this process.
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# Time limit for each collective operation. It is long because all processes wait while rank 0 runs Phase 1.
COLLECTIVE_TIMEOUT = timedelta(days=2)
OTHER_ENDED = "Another process of this run has ended; finished stages and saved epochs are kept."
T = TypeVar("T")


class PeerFailed(UserError):
    """Another process of this run has failed. The failed process prints the reason."""


def world_size() -> int:
    """Return the number of processes in this run: 1 unless a launcher started this process."""
    return int(os.environ["WORLD_SIZE"]) if os.environ.keys() >= LAUNCHER else 1


def rank() -> int:
    """Return the rank of this process. Only rank 0 prints and writes to the run folder."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def join(device: "torch.device") -> None:
    """Connect to the other processes, if any. Raises UserError if there are fewer GPUs than processes."""
    import torch
    from torch import distributed

    if world_size() == 1 or distributed.is_initialized():
        return
    if device.type == "cuda":
        place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= gpus:
            raise UserError(
                f"Process {place} has no GPU of its own, since this machine has {gpus}; start one "
                "process per GPU."
            )
        torch.cuda.set_device(place)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT
    )


def shard(rows: int) -> slice:
    """Return this process's slice of `rows` consecutive rows. The first processes may get one extra row."""
    least, more = divmod(rows, world_size())
    start = rank() * least + min(rank(), more)
    return slice(start, start + least + (rank() < more))


def all_reduce(tensors: Sequence["Tensor"]) -> None:
    """Replace contiguous tensors by their sums over all processes. Raises PeerFailed if a process ends."""
    if world_size() > 1:
        from torch import distributed

        try:
            for exchange in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                exchange.wait()
        except RuntimeError as error:
            raise PeerFailed(OTHER_ENDED) from error


def on_rank_0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 while the other ranks wait, and return its result on every rank.

    If `make` raises an error, all ranks stop: rank 0 raises this error, and the other ranks raise PeerFailed
    with the same message.
    """
    if world_size() == 1:
        return make()
    from torch import distributed

    # The first item is the result of `make`, and the second is the message of its error.
    outcome: list[Any] = [None, ""]
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
            raise PeerFailed(OTHER_ENDED) from error
    if outcome[1]:
        raise PeerFailed(outcome[1])
    return outcome[0]
