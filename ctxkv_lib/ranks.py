"""Several processes in one run: shards, collectives, and work on rank 0 only.

`accelerate launch`, torchrun and the launchers of notebooks start the processes and set environment
variables. A single process runs the same code without exchange and heavy imports.
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATIENCE = timedelta(days=2)  # that processes wait for rank 0 and for each other
T = TypeVar("T")


class Ended(UserError):
    """Another process failed and printed the reason."""


_alone = False  # during work on rank 0


def world_size() -> int:
    """Return the number of processes in this run; 1 inside `on_rank_0`."""
    return 1 if _alone or "RANK" not in os.environ else int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return the number of this process; only rank 0 writes into the run folder, and logs."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def join(device: "torch.device") -> None:
    """Connect with the other processes, if there are any; each takes a GPU of its own.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    import torch
    from torch import distributed

    if world_size() == 1 or distributed.is_initialized():
        return
    if device.type == "cuda":
        place, most = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", place + 1))
        if here > most:  # which every process finds if the launcher says how many there are
            gpus = f"{most} GPU{'s' if most > 1 else ''}"
            raise UserError(f"{here} processes, but {gpus}: start one for each GPU.")
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    atexit.register(_leave)


def _leave() -> None:
    """Leave the process group, unless the program has done so."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def shards(num_items: int) -> list[slice]:
    """Return each process's shard of `num_items` consecutive items; the first ones may have one more."""
    least, more = divmod(num_items, world_size())
    ends = [number * least + min(number, more) for number in range(world_size() + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def shard(rows: int) -> slice:
    """Return this process's shard of so many rows."""
    return shards(rows)[rank()]


def all_reduce(tensors: Sequence["Tensor"]) -> None:
    """Overwrite contiguous tensors with their sums over all processes."""
    if world_size() == 1:
        return
    from torch import distributed

    with _exchange():
        for exchange in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
            exchange.wait()


def broadcast(parts: Sequence["Tensor"]) -> None:
    """Overwrite contiguous tensors, one for each rank, with the values of that rank."""
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    for owner, part in enumerate(parts):
        if part.numel():
            with _exchange():
                distributed.broadcast(part.view(torch.uint8), owner)


def on_rank_0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 while the others wait, and return its result on all; an error ends all processes.

    Inside, rank 0 counts as the only process, so it may call functions of this module.
    """
    global _alone
    if world_size() == 1:
        return make()
    from torch import distributed

    outcome: list[Any] = [None, None]
    failed: Exception | None = None
    if rank() == 0:
        _alone = True
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1], failed = str(error) or type(error).__name__, error
        finally:
            _alone = False
    with _exchange():
        distributed.broadcast_object_list(outcome)
    if failed:
        raise failed
    if outcome[1]:
        raise Ended(outcome[1])
    return outcome[0]


@contextmanager
def _exchange() -> Iterator[None]:
    """Turn the error of a lost process into a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise Ended(
            "Another process of this run has ended; it says why, or was ended from outside. "
            "What is finished is kept."
        ) from error


def is_first_to_say(sentence: str) -> bool:
    """Return True for the first request of a sentence over all processes, so that one prints it."""
    if world_size() == 1:
        return True
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return rank() == 0
    try:
        return distributed.distributed_c10d._get_default_store().add(sentence, 1) == 1
    except RuntimeError:  # the process that kept the count has ended, and has printed it
        return False
