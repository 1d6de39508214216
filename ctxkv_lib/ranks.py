"""Several processes at one run: which part is whose, what is added up, and what the first does for all.

`accelerate launch`, torchrun and the launchers of notebooks start them and say so in their environment. One
process is the same code with nothing to exchange. Heavy imports wait until there is.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NORMAL_VECTOR = 16  # draws that a CPU makes at once; of other counts torch draws the last ones twice
PATIENCE = timedelta(days=2)  # that processes wait for the first one to measure, and for each other
T = TypeVar("T")


class Ended(UserError):
    """Another process could not go on; that one says why."""


_alone = False  # while the first does something for all


def count() -> int:
    """How many processes work at this run; 1 where the first does something for all."""
    return 1 if _alone or "RANK" not in os.environ else int(os.environ.get("WORLD_SIZE", 1))


def index() -> int:
    """Which of them this is, from 0, the first: the only one that writes into the run folder, and speaks."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def join(device: "torch.device") -> None:
    """Meet the other processes, if there are any; each takes a GPU of its own.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    import torch
    from torch import distributed

    if count() == 1 or distributed.is_initialized():
        return
    if device.type == "cuda":
        place, most = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if place >= most:
            raise UserError(f"{place + 1} processes or more, but {most} GPUs: start one for each GPU.")
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    atexit.register(_leave)


def _leave() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def shares(num_items: int) -> list[slice]:
    """The part of so many items in a row that each process takes; the first ones take one more if need be."""
    least, more = divmod(num_items, count())
    ends = [number * least + min(number, more) for number in range(count() + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def share(num_items: int) -> slice:
    """The part that this process takes."""
    return shares(num_items)[index()]


def sum_(tensors: Sequence["Tensor"]) -> None:
    """Overwrite contiguous tensors with their sums over all processes."""
    if count() == 1:
        return
    from torch import distributed

    with _exchange():
        for exchange in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
            exchange.wait()


def share_(parts: Sequence["Tensor"]) -> None:
    """Overwrite contiguous tensors: the first with that of the first process, and so on."""
    if count() == 1:
        return
    import torch
    from torch import distributed

    for owner, part in enumerate(parts):
        if part.numel():
            with _exchange():
                distributed.broadcast(part.view(torch.uint8), owner)


def skip_normal(like: "Tensor", generator: "torch.Generator") -> None:
    """Bring a generator to where `like.normal_`, for another process, would; overwrites `like` with anything.

    On a CPU a uniform draw takes as many of the generator's numbers, and half the time.
    """
    if like.device.type == "cpu" and like.numel() % NORMAL_VECTOR == 0:
        like.uniform_(generator=generator)
    else:
        like.normal_(generator=generator)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process; the others wait for it, and an error there ends all.

    Inside, the first is alone: it may call what uses this module.
    """
    global _alone
    if count() == 1:
        return make()
    from torch import distributed

    outcome: list[Any] = [None, None]
    failed: Exception | None = None
    if index() == 0:
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
    """Inside, a process that is no more is an error in a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise Ended(
            "Another process of this run has ended; it says why, or was ended from outside. "
            "What is finished is kept."
        ) from error


def is_first_to_say(sentence: str) -> bool:
    """Whether no other process has asked this for the same sentence, so that all of them say it once."""
    from sys import modules

    if count() == 1:
        return True
    distributed = modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return index() == 0
    try:
        return distributed.distributed_c10d._get_default_store().add(sentence, 1) == 1
    except RuntimeError:  # the process that kept the count has ended: it has spoken
        return False
