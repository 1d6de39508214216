"""CPU and GPU memory, now and at most, stage by stage."""

import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

MIB = 2**20
GIB = 2**30
PROCESS = Path("/proc/self")  # Linux


class _CpuPeak:
    """The process's largest resident set since `begin`, in bytes.

    Linux can reset its count. Elsewhere a process only knows its peak since it started: that is the stage's
    own if it has grown since the stage began; else the size at the snapshot stands for it.
    """

    def __init__(self) -> None:
        self._inherited = self._seen = 0

    def begin(self) -> None:
        try:
            (PROCESS / "clear_refs").write_text("5")  # resets VmHWM
            self._inherited = 0
        except OSError:
            self._inherited = _process_peak()
        self._seen = 0

    def now(self, resident: int) -> int:
        self._seen = max(self._seen, resident)
        peak = _process_peak()
        return peak if peak > self._inherited else self._seen


_cpu_peak = _CpuPeak()


def begin_peaks(device: torch.device) -> None:
    """Reset the peaks: from here on they are those of the stage that begins."""
    _cpu_peak.begin()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def mib(num_bytes: float) -> float:
    """Bytes as MiB, to two decimals."""
    return round(num_bytes / MIB, 2)


def snapshot(stage: str, device: torch.device) -> dict[str, Any]:
    """Measure memory at the end of a stage, in GiB, and reset the peaks for the next one.

    `cpu_gib` is the process's resident set now and `cpu_peak_gib` the largest during the stage;
    `gpu_gib` and `gpu_peak_gib` are what torch's allocator holds in tensors, None without a GPU (and, for
    the peak, on mps, which does not count it).
    """
    gpu, gpu_peak = _gpu_bytes(device)
    resident = psutil.Process().memory_info().rss
    rounded = {
        "cpu_gib": resident,
        "gpu_gib": gpu,
        "cpu_peak_gib": _cpu_peak.now(resident),
        "gpu_peak_gib": gpu_peak,
    }
    begin_peaks(device)
    return {"stage": stage, **{k: None if v is None else round(v / GIB, 3) for k, v in rounded.items()}}


def release(device: torch.device) -> None:
    """Give back what torch's allocator keeps for later, so that free memory can be measured."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _gpu_bytes(device: torch.device) -> tuple[int | None, int | None]:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory(), None
    return None, None


def _process_peak() -> int:
    """Since the process started or, on Linux, since its count was reset."""
    if counted := _linux_peak():
        return counted
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _linux_peak() -> int | None:
    try:
        status = (PROCESS / "status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
