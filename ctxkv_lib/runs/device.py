"""Choose a run's device, precision and threads, and restore torch's state after the run."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import context, current_process
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError

NEW_SETTINGS = hasattr(torch.backends.cudnn, "conv")  # torch 2.9 added `fp32_precision`
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # /proc/cpuinfo flags (x86, Arm)


def choose_device(name: str) -> torch.device:
    """Choose the device. `auto` chooses cuda if it is available, else mps, else cpu.

    Raises:
        UserError: This machine does not have the device.
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
    """Return `fp32` or `bf16`. `auto` selects bf16 if the processor or GPU supports it in hardware.

    The precision is the dtype of the stored training contexts (`runs.contexts`) and of all matrix products in
    Phase 2's training (`phase2.batch_gradients`). Everything else is fp32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_flags() & BF16_FLAGS else "fp32"


def _cpu_flags() -> set[str]:
    """Return the words of /proc/cpuinfo, which include the CPU's flags, or an empty set outside Linux."""
    with suppress(OSError):
        return set(Path("/proc/cpuinfo").read_text().split())
    return set()


@contextmanager
def torch_state(threads: str = "auto") -> Iterator[None]:
    """Use `threads` CPU threads and no TF32 in a `with` block. The original does not use TF32 either.

    After the block, these settings and the states of torch's random generators (CPU and GPUs) are restored.
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
        set_threads(number if threads == "auto" else int(threads))
        try:
            yield
        finally:
            torch.set_num_threads(number)
            torch.set_float32_matmul_precision(products)
            cudnn.allow_tf32 = tf32
            for place, precision in zip(places, precisions, strict=True):
                place.fp32_precision = precision


def set_threads(threads: int) -> None:
    """Set the number of torch's threads. In a forked process, always use one thread.

    Notebook launchers start processes by forking. A forked process has no OpenMP threads, but OpenMP would
    wait for them forever.
    """
    is_forked = isinstance(current_process(), getattr(context, "ForkProcess", ()))  # Windows has no forks
    torch.set_num_threads(1 if is_forked else threads)
