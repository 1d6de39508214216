"""Where and how a run computes: device, precision, threads, and what it leaves as it was."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import context, current_process
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..progress import log

NEW_SETTINGS = hasattr(torch.backends.cudnn, "conv")  # of precision, from torch 2.9 on beside the old ones
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and of Arm, in /proc/cpuinfo


def choose_device(name: str) -> torch.device:
    """Choose the device; `auto` takes cuda, then mps, then cpu.

    Raises:
        UserError: the machine lacks the named device.
    """
    devices = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind, is_available in devices.items() if is_available]
    if name != "auto" and name not in available:
        allowed = ", ".join(available)
        raise UserError(
            f"runtime.device is {name!r}, which this machine lacks; allowed here: auto, {allowed}."
        )
    return torch.device(available[0] if name == "auto" else name)


def choose_precision(name: str, device: torch.device) -> str:
    """Return `fp32` or `bf16`; `auto` takes bf16 if the processor or GPU reports units for it.

    A run that was begun with `auto` keeps its precision instead (`experiments._precision`). The result, as
    `Inputs.precision`, decides the dtype of the cached training contexts (`stages._write_caches`) and of all
    matrix products of Phase 2's training (`phase2.batch_gradients`). It is part of what the stages contexts
    and phase2 are made from. Everything else is fp32. `report.times` asks here, too.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_flags() & BF16_FLAGS else "fp32"


def warn_of_slow_bf16(begun_in: str, chosen_here: str) -> None:
    """Print a line if a run that was begun in bf16 goes on where `choose_precision` chooses fp32."""
    if (begun_in, chosen_here) == ("bf16", "fp32"):
        log(
            "This run goes on in bf16, in which it was begun, but this device has no units for bf16, so "
            "training is slow. A new run in another folder would train in fp32."
        )


def _cpu_flags() -> set[str]:
    """Return the processor's features as Linux lists them, or an empty set on other systems."""
    with suppress(OSError):
        return set(Path("/proc/cpuinfo").read_text().split())
    return set()


@contextmanager
def torch_state(threads: str = "auto") -> Iterator[None]:
    """Inside, fp32 products are not TF32, as in the original, and torch has so many threads.

    Behind it, these settings and torch's random generators, those of GPUs too, are as they were.
    """
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    products, tf32, number = torch.get_float32_matmul_precision(), cudnn.allow_tf32, torch.get_num_threads()
    places: list[Any] = [torch.backends.cuda.matmul, mkldnn.matmul] if NEW_SETTINGS else []
    places += [cudnn.conv, cudnn.rnn] if NEW_SETTINGS else []
    precisions = [place.fp32_precision for place in places]
    with torch.random.fork_rng([*range(torch.cuda.device_count())]):
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        for place in places:
            place.fp32_precision = "ieee"
        _set_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(number)
            torch.set_float32_matmul_precision(products)
            cudnn.allow_tf32 = tf32
            for place, precision in zip(places, precisions, strict=True):
                place.fp32_precision = precision


def _set_threads(threads: str) -> None:
    """Let torch compute with so many threads, but with one in a forked process.

    Launchers of notebooks fork. A fork has no copies of OpenMP's threads, for which OpenMP would wait
    forever.
    """
    if isinstance(current_process(), getattr(context, "ForkProcess", ())):  # Windows has no forks
        torch.set_num_threads(1)
    elif threads != "auto":
        torch.set_num_threads(int(threads))
