"""Time, memory and arithmetic of functions, measured side by side."""

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..progress import progress_bar

WARM_UP = 2  # rounds that are not counted
CALLS = {"cpu": 1, "cuda": 20, "mps": 20}  # of a candidate in a round: a GPU is kept busy, as in training
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # of the square matrices whose product is timed
SAMPLING_SECONDS = 0.002  # between two looks at the process's memory


def interleaved(
    candidates: Mapping[Any, Callable[[], Any]], rounds: int, device: torch.device, title: str
) -> dict[Any, float]:
    """Median seconds of each candidate; every round runs each of them once, so all see the same machine."""
    times: dict[Any, list[float]] = {name: [] for name in candidates}
    for _ in progress_bar(range(WARM_UP + rounds), title):
        for name, function in candidates.items():
            times[name].append(seconds_of(function, device))
    return {name: statistics.median(taken[WARM_UP:]) for name, taken in times.items()}


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Mean seconds of a call."""
    calls = CALLS[device.type]
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize(device)
    return (time.perf_counter() - began) / calls


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations (multiply-adds times two) a second of a square matrix product of `dtype`, at best."""
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = [seconds_of(lambda: torch.mm(left, right, out=out), device) for _ in range(8)]
    return 2 * size**3 / min(times)


def operations(function: Callable[[], Any]) -> int:
    """Operations (multiply-adds times two) of all matrix products of one call, backward included."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """How much memory in use grows, at most, while `function` runs.

    On cuda what torch's allocator holds; elsewhere the process's resident set, sampled every 2 ms.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, AttributeError):  # else what earlier calls freed would hide what this one takes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    sizes = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(SAMPLING_SECONDS):
            sizes[1:] = [max(sizes[-1], process.memory_info().rss)]

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return sizes[-1] - sizes[0]
