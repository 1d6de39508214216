"""Time, memory and arithmetic of functions, measured side by side."""

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..method.memory import mib
from ..progress import progress_bar

WARM_UP = 2  # rounds that are not counted
CALLS = {"cpu": 1, "cuda": 20, "mps": 20}  # of a candidate in a round: a GPU is kept busy, as in training
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # of the square matrices whose product is timed
SAMPLING_SECONDS = 0.002  # between two looks at the process's memory
STEPS_FOR_MEMORY = 3

Steps = Iterator[float | Tensor]  # each does one iteration or optimiser step, and returns its mean loss


def compare(
    makers: Mapping[str, Callable[[], Steps]],
    rates: Mapping[str, float],
    rounds: int,
    device: torch.device,
    title: str,
    head_operations: int = 0,
) -> dict[str, dict[str, float]]:
    """Measure time, memory, loss and matrix products of several ways to do the same steps.

    Args:
        makers: each makes its steps from the same weights; the first is what the others are compared with.
        rates: of matrix products, `fp32` and `bf16`; only a maker named `bf16` uses the latter.
        rounds: steps that are timed.
        head_operations: of the output head in one step, all that is bf16 on a CPU.

    Returns:
        by name: `seconds`, `ratio` (how many times as fast as the first), `peak_mib` (peak memory of set-up
        and three steps), `loss_difference` (largest, from the first's), `operations`, `floor_seconds` (those
        operations at the measured rates) and `floor_share` (floor / seconds).
    """

    def few(make: Callable[[], Steps]) -> None:
        for _ in islice(make(), STEPS_FOR_MEMORY):
            pass

    peaks = {name: peak_bytes(partial(few, make), device) for name, make in makers.items()}
    losses: dict[str, list[float | Tensor]] = {name: [] for name in makers}
    steps = {name: make() for name, make in makers.items()}
    timed = {name: partial(lambda n: losses[n].append(next(steps[n])), name) for name in makers}
    seconds = interleaved(timed, rounds, device, title)
    first, rows = next(iter(makers)), {}
    for name in makers:
        total = operations(partial(next, steps[name]))
        in_bf16 = 0 if name != "bf16" else head_operations if device.type == "cpu" else total
        floor = in_bf16 / rates["bf16"] + (total - in_bf16) / rates["fp32"]
        differences = [abs(float(a) - float(b)) for a, b in zip(losses[name], losses[first], strict=True)]
        rows[name] = {
            "seconds": seconds[name],
            "ratio": seconds[first] / seconds[name],
            "peak_mib": mib(peaks[name]),
            "loss_difference": max(differences),
            "operations": total,
            "floor_seconds": floor,
            "floor_share": floor / seconds[name],
        }
    return rows


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
