"""Time, memory and arithmetic of functions, measured side by side."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..method.memory import snapshot
from ..progress import progress_bar

WARM_UP = 2  # rounds that are not counted
CALLS = {"cpu": 1, "cuda": 20, "mps": 20}  # of a candidate in a round: a GPU is kept busy, as in training
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # of the square matrices whose product is timed
STEPS_FOR_MEMORY = 5  # a CUDA graph is captured within them
GRAPH = "_graph"  # ends the name of a way that does the same operations as one CUDA graph

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
        makers: each makes its steps from the same weights; the others are compared with the first.
        rates: of matrix products, `fp32` and `bf16`; only makers named `bf16` use the latter.
        head_operations: of the output head in one step, all that is bf16 on a CPU.

    Returns:
        by name: `seconds`, `ratio` (how many times as fast as the first), `peak_mib` (peak memory of set-up
        and five steps), `loss_difference` (largest, from the first's), `operations`, `floor_seconds` (those
        operations at the measured rates) and `floor_share` (floor / seconds).
    """
    peaks = {name: peak_mib(partial(_few_steps, make), device) for name, make in makers.items()}
    steps = {name: make() for name, make in makers.items()}
    losses: dict[str, list[float | Tensor]] = {name: [] for name in makers}
    timed = {name: partial(lambda n: losses[n].append(next(steps[n])), name) for name in makers}
    seconds = interleaved(timed, rounds, device, title)
    first = next(iter(makers))
    rows: dict[str, dict[str, float]] = {}
    for name, taken in seconds.items():
        same = name.removesuffix(GRAPH)
        total = rows[same]["operations"] if same in rows else operations(partial(next, steps[name]))
        in_bf16 = 0 if same != "bf16" else head_operations if device.type == "cpu" else total
        floor = in_bf16 / rates["bf16"] + (total - in_bf16) / rates["fp32"]
        rows[name] = {
            "seconds": taken,
            "ratio": seconds[first] / taken,
            "peak_mib": peaks[name],
            "loss_difference": max(
                abs(float(a) - float(b)) for a, b in zip(losses[name], losses[first], strict=True)
            ),
            "operations": total,
            "floor_seconds": floor,
            "floor_share": floor / taken,
        }
    return rows


def _few_steps(make: Callable[[], Steps]) -> None:
    for _ in islice(make(), STEPS_FOR_MEMORY):
        pass


def interleaved(
    candidates: Mapping[Any, Callable[[], Any]], rounds: int, device: torch.device, title: str
) -> dict[Any, float]:
    """Measure median seconds of each candidate; every round runs each once, under the same load."""
    times: dict[Any, list[float]] = {name: [] for name in candidates}
    for _ in progress_bar(range(WARM_UP + rounds), title):
        for name, function in candidates.items():
            times[name].append(seconds_of(function, device))
    return {name: statistics.median(taken[WARM_UP:]) for name, taken in times.items()}


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Measure the mean seconds of a call."""
    calls, synchronize = CALLS[device.type], getattr(torch, device.type).synchronize
    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - began) / calls


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure operations (multiply-adds times two) a second of a square matrix product, at best."""
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(left, right, out=out), device) for _ in range(8))


def operations(function: Callable[[], Any]) -> int:
    """Count operations (multiply-adds times two) of all matrix products of a call, backward included."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_mib(function: Callable[[], Any], device: torch.device) -> float:
    """Measure the peak growth of memory while `function` runs, to one MiB, as `method.memory` does.

    On cuda this is the memory of torch's allocator, elsewhere the process's resident set.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # else what earlier calls freed would hide what this one takes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    kind = "gpu" if device.type == "cuda" else "cpu"
    before = snapshot("before", device)[f"{kind}_gib"]
    function()
    return round(1024 * (snapshot("after", device)[f"{kind}_peak_gib"] - before))
