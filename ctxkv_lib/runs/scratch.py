"""Allocate large tensors: on the device if they fit, else in memory, else in a mapped file."""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import psutil
import torch
from torch import Tensor

from ..errors import is_out_of_memory
from ..method.memory import GIB, mib
from ..progress import say

HEADROOM_BYTES = GIB  # left free for what training itself needs
HOST = torch.device("cpu")
ZEROS_BYTES = 2**24  # written at a time where space cannot be reserved otherwise
PART_ROWS = 2**14  # of contexts at a time, where all at once would fill the memory
T = TypeVar("T")

_files: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by where in memory they begin


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be taken; mps shares the host's."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()  # of what torch keeps for later
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def scratch(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, folder: Path, spare_memory: bool = False
) -> Tensor:
    """Make a tensor of any content in the fastest place that has room for it.

    Args:
        device: the first place to try.
        folder: where a mapped file goes if memory will not do; it is gone when the tensor is.
        spare_memory: no memory of the host will do.

    Raises:
        OSError: the disk has no room for it either.
    """
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    for place in dict.fromkeys((device, HOST)):
        if spare_memory and place == HOST:
            continue
        made = if_it_fits(num_bytes, place, partial(torch.empty, shape, dtype=dtype, device=place))
        if made is not None:
            return made
        say(f"{mib(num_bytes):,.0f} MiB of contexts do not fit on {place.type}: they go to a slower place.")
    file = _mapped_file(num_bytes, folder)
    made = torch.frombuffer(file, dtype=dtype).view(shape)
    _files[made.data_ptr()] = file
    return made


def release_mapped(tensor: Tensor) -> None:
    """Free the memory that a `scratch` tensor in a mapped file takes; its numbers stay in the file."""
    file = _files.get(tensor.untyped_storage().data_ptr())
    if file is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        file.madvise(mmap.MADV_DONTNEED)


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """Split a tensor into parts of some rows; those of a mapped file do not gather in memory."""
    for part in tensor.split(PART_ROWS) if tensor.dim() else (tensor,):
        yield part
        release_mapped(tensor)


def if_it_fits(num_bytes: int, place: torch.device, make: Callable[[], T]) -> T | None:
    """Return what `make` makes; None if there is no room, or too little although it looked enough."""
    if num_bytes + HEADROOM_BYTES > free_bytes(place):
        return None
    try:
        return make()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _mapped_file(num_bytes: int, folder: Path) -> mmap.mmap:
    """Memory that stands for a file without a name; the system removes it with its last user."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            _reserve(file.fileno(), num_bytes)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from None
        return mmap.mmap(file.fileno(), num_bytes)


def _reserve(file: int, num_bytes: int) -> None:
    """Give a file its space on the disk now: mapped memory that lacks it later kills the process."""
    if hasattr(os, "posix_fallocate"):  # which writes itself where a file system cannot reserve
        return os.posix_fallocate(file, 0, num_bytes)
    zeros = bytes(ZEROS_BYTES)
    left = num_bytes
    while left:
        left -= os.write(file, zeros[:left])
