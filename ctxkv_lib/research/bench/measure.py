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

from ...progress import progress_bar

SAMPLING_SECONDS = 0.002
WARM_UP = 2  # rounds that are not counted
CALLS = {"cpu": 1, "cuda": 20, "mps": 20}  # of a candidate in a round: a GPU is kept busy, as in training
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # of the square matrices whose product is timed
Candidates = Mapping[str, Callable[[], Any]]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Mean seconds of a call."""
    calls = CALLS[device.type]
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def interleaved(candidates: Candidates, rounds: int, device: torch.device, title: str) -> dict[str, float]:
    """Median seconds of each candidate; every round runs each of them once, so all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in progress_bar(range(WARM_UP + rounds), title):
        for name, function in candidates.items():
            times[name].append(seconds_of(function, device))
    return {name: statistics.median(taken[WARM_UP:]) for name, taken in times.items()}


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-adds times two that a square matrix product of `dtype` does in a second, at best."""
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = [seconds_of(lambda: torch.mm(left, right, out=out), device) for _ in range(8)]
    return 2 * size**3 / min(times)


def operations(function: Callable[[], Any]) -> int:
    """Multiply-adds times two of all matrix products of one call, backward included."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """How much memory in use grows, at most, while `function` runs.

    On cuda what torch's allocator holds; elsewhere the process's resident set, looked at every 2 ms.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, AttributeError):  # else what earlier calls freed would hide what this one takes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, done, peak = psutil.Process(), threading.Event(), 0
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLING_SECONDS):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return max(0, peak - before)
