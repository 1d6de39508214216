"""Measure the current and peak memory use of CPU and GPU in each stage."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

GIB = 2**30
PROCESS = Path("/proc/self")  # Linux


def snapshot(stage: str, device: torch.device) -> dict[str, Any]:
    """Measure memory use in GiB at the end of a stage, and reset the peaks for the next stage.

    Returns:
        A dict with `stage`; `cpu_gib`, the resident set of the process; `cpu_peak_gib`, the largest resident
        set during the stage (only Linux can reset the peak, so other systems report the current size); and
        `gpu_gib` and `gpu_peak_gib`, the current and largest size of all tensors that torch has allocated.
        Both GPU values are None without a GPU. On mps, only `gpu_peak_gib` is None.
    """
    gpu = gpu_peak = None
    if device.type == "cuda":
        gpu, gpu_peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    elif device.type == "mps":
        gpu = torch.mps.current_allocated_memory()
    resident = psutil.Process().memory_info().rss
    sizes = {"cpu": resident, "gpu": gpu, "cpu_peak": max(resident, _linux_peak()), "gpu_peak": gpu_peak}
    begin_peaks(device)
    in_gib = {f"{k}_gib": None if v is None else round(v / GIB, 3) for k, v in sizes.items()}
    return {"stage": stage, **in_gib}


def begin_peaks(device: torch.device) -> None:
    """Reset the counters of peak memory at the beginning of a stage."""
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")  # resets VmHWM
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _linux_peak() -> int:
    """Return the size in bytes of the largest resident set since `begin_peaks`; 0 if not on Linux."""
    with suppress(OSError):
        if line := re.search(r"^VmHWM:\s*(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE):
            return int(line[1]) * 1024
    return 0
