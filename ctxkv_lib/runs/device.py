"""Where a run computes: device, precision and threads."""

from contextlib import suppress
from multiprocessing import context, current_process
from pathlib import Path

import torch

from ..errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and of Arm, in /proc/cpuinfo


def choose_device(name: str) -> torch.device:
    """Choose the device; `auto` takes cuda, then mps, then cpu.

    Raises:
        UserError: the machine lacks the named device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    torch.set_float32_matmul_precision("highest")  # fp32 products are fp32, as the original's were
    torch.backends.cudnn.allow_tf32 = False
    for kind in ("conv", "rnn"):  # from torch 2.9 on, each has its own
        if hasattr(torch.backends.cudnn, kind):
            getattr(torch.backends.cudnn, kind).fp32_precision = "ieee"
    if not there[name]:
        found = ", ".join(kind for kind, available in there.items() if available)
        raise UserError(f"runtime.device is {name!r}, which this machine lacks; allowed here: auto, {found}.")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """Return `fp32` or `bf16`; `auto` takes bf16 if the processor or GPU reports units for it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_flags() & BF16_FLAGS else "fp32"


def _cpu_flags() -> set[str]:
    """Return the processor's features that Linux lists; nothing on other systems."""
    with suppress(OSError):
        return set(Path("/proc/cpuinfo").read_text().split())
    return set()


def set_threads(threads: str) -> None:
    """Let torch compute with so many threads, but with one in a forked process.

    Launchers of notebooks fork. A fork has no copies of OpenMP's threads, for which OpenMP would wait
    forever.
    """
    if isinstance(current_process(), getattr(context, "ForkProcess", ())):  # Windows has no forks
        torch.set_num_threads(1)
    elif threads != "auto":
        torch.set_num_threads(int(threads))
