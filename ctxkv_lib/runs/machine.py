"""How a run uses its machine: threads and precision, measured where they are `auto`, kept once it has begun.

Both change what sums are rounded to, so a run that goes on takes what it began with, not what would be
quickest now.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from .. import ranks
from ..files import digest
from ..method.losses import VOCABULARY_CHUNK, frozen_head_cross_entropy
from ..progress import notice, say, stage, watchers
from ..threads import set_threads
from .config import RuntimeConfig
from .inputs import Facts, Work
from .provenance import PRECISIONS, device_name
from .records import Record

LEAST_GAIN = {"bf16": 1.3, "threads": 1.1}  # times as fast: fewer threads, and fp32, are taken for less
SECONDS = 0.5  # that measuring threads may take, beyond one step with each number
ROUNDS = 5
PRODUCT = (128, 768, 1024)  # of the matrices that precision is measured on: 2 ms in fp32


@contextmanager
def threads_put_back() -> Iterator[None]:
    """Inside, a run may choose how many threads torch has."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_machine(work: Work, phase1: Record | None) -> str:
    """Decide how the run computes, or take up what it began with; from here on torch has that many threads.

    The record `machine` of the folder has `precision`, `threads` and the `device` that they were chosen for;
    also `begun_with`, the same of another machine, if Phase 2 was begun there with another precision.

    Args:
        phase1: its record, if it is finished.

    Returns:
        the precision of Phase 2's matrix products, and thereby of the caches.
    """
    phase2 = phase1 and work.folder.finished("phase2", work.inputs.phase2_key(phase1))
    used = phase2.result["provenance"] if phase2 else _kept_or_chosen(work, phase1)
    set_threads(used["threads"])
    return used["precision"]


def _kept_or_chosen(work: Work, phase1: Record | None) -> Facts:
    folder, runtime, device = work.folder, work.inputs.config.runtime, work.model.device
    key = digest([runtime.threads, runtime.precision, device_name(device), torch.__version__])
    if held := folder.finished("machine", key):
        return held.result
    with stage("Measuring threads and precision"):
        used = ranks.from_first(lambda: _choose(work, runtime, device))
    before = folder.records.stages["machine"].result if "machine" in folder.records.stages else used
    if phase1 and "caches" in folder.records.stages and before["precision"] != used["precision"]:
        notice(
            f"runtime.precision=auto was {before['precision']} on {before['device']} and is "
            f"{used['precision']} on {used['device']}: the caches are made again, and Phase 2 goes on in "
            f"{used['precision']}."
        )
        states = folder.phase2_checkpoint
        if any(states.parent.glob(f"{states.stem}.*")):
            used["begun_with"] = before.get("begun_with", before)
    folder.finish("machine", key, [], used)
    return used


def _choose(work: Work, runtime: RuntimeConfig, device: torch.device) -> Facts:
    """What the settings say; for `auto`, what is quickest here and now, told in one line."""
    precision, threads, told = runtime.precision, torch.get_num_threads(), []
    if precision == "auto":
        is_faster, why = bf16_verdict(device)
        precision = "bf16" if is_faster else "fp32"
        told.append(f"{precision} ({why})")
    if runtime.threads != "auto":
        threads = int(runtime.threads)
    elif device.type == "cpu" and threads > 1:
        shape = (work.inputs.config.phase2.batch_size, *work.model.wte.weight.shape[::-1])
        seconds = step_seconds(shape, precision, threads)
        threads = quickest(seconds)
        others = ", ".join(f"{1000 * taken:.3g} ms with {n}" for n, taken in seconds.items())
        told.append(f"{threads} of {max(seconds)} threads (a step's products take {others})")
    if told:
        _tell(f"Chosen: {'; '.join(told)}. runtime.precision and runtime.threads choose otherwise.")
    return {"precision": precision, "threads": threads, "device": device_name(device)}


@cache
def _tell(line: str) -> None:
    """Once, however many runs of this process are told so."""
    (notice if watchers else say)(line)  # on a terminal, or beside a notebook's live view


def bf16_verdict(device: torch.device) -> tuple[bool, str]:
    """Whether the device is to multiply in bf16, and why; a GPU says by itself if it has units for it."""
    if device.type == "cuda":
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
        return has_units, f"the GPU has {'' if has_units else 'no '}units for bf16"
    if device.type != "cpu":
        return False, f"bf16 was never measured on {device.type}"
    gain = bf16_gain()
    return gain >= LEAST_GAIN["bf16"], f"bf16 products are {gain:.2g} times as fast as fp32 ones"


@cache
def bf16_gain() -> float:
    """How many times as fast as in fp32 the CPU multiplies in bf16; without kernels for it, a fraction.

    It is the time of one thread that counts, which other work on the machine does not change.
    """
    with threads_put_back():
        torch.set_num_threads(1)
        return _product_seconds("fp32") / _product_seconds("bf16")


def _product_seconds(precision: str) -> float:
    rows, inner, columns = PRODUCT
    left, right = (torch.ones(n, inner, dtype=PRECISIONS[precision]) for n in (rows, columns))
    taken = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        left @ right.T
        taken.append(time.thread_time() - began)
    return min(taken)


@cache
def step_seconds(shape: tuple[int, int, int], precision: str, most: int) -> dict[int, float]:
    """Seconds of one chunk of the output head, by number of threads: one, half of them, `most`.

    Args:
        shape: positions of a batch, hidden size, vocabulary size.
    """
    count, hidden_size, vocabulary = shape
    chunk = min(vocabulary, VOCABULARY_CHUNK["cpu"])
    hidden = torch.ones(count, hidden_size, requires_grad=True)
    table = torch.ones(chunk, hidden_size, dtype=PRECISIONS[precision])
    targets = torch.zeros(count, dtype=torch.int64)
    taken: dict[int, list[float]] = {n: [] for n in sorted({1, max(1, most // 2), most})}
    began = time.perf_counter()
    with threads_put_back():
        for done in range(1 + ROUNDS):
            for threads, times in taken.items():
                torch.set_num_threads(threads)
                tick = time.perf_counter()
                frozen_head_cross_entropy(hidden, table, targets)
                times.append(time.perf_counter() - tick)
            if done and time.perf_counter() - began > SECONDS:
                break
    return {n: statistics.median(times[1:]) for n, times in taken.items()}  # the first ones warm up


def quickest(seconds: dict[int, float]) -> int:
    """The fewest threads that are almost as fast as any."""
    return min(n for n, taken in seconds.items() if taken <= LEAST_GAIN["threads"] * min(seconds.values()))
