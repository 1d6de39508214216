"""Where large tensors are held: on the device if they fit, else in memory, else in a mapped file."""

import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..memory import GIB, mib
from ..progress import say

HEADROOM_BYTES = GIB  # left free for what training itself needs
HOST = torch.device("cpu")


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken; mps shares the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether the device has `num_bytes` free, and some headroom."""
    return num_bytes + HEADROOM_BYTES <= free_bytes(device)


def scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, folder: Path) -> Tensor:
    """A tensor of any content in the fastest place that has room for it.

    Args:
        device: the first place to try.
        folder: where a mapped file goes if memory will not do; it is gone when the tensor is.
    """
    count = shape[0] * shape[1]
    num_bytes = count * dtype.itemsize
    for place in dict.fromkeys((device, HOST)):
        if fits(num_bytes, place):
            return torch.empty(shape, dtype=dtype, device=place)
        say(f"{mib(num_bytes):,.0f} MiB of contexts do not fit on {place.type}: they go to a slower place.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{os.getpid()}.scratch"
    mapped = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    with suppress(PermissionError):  # Windows keeps the name of a mapped file
        path.unlink()
    return mapped.view(shape)
