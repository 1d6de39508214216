"""CPU and GPU memory: what is used, stage by stage, and when there is no more."""

import sys
from typing import Any

import psutil
import torch

MIB = 2**20
GIB = 2**30
# How plain RuntimeErrors say it: torch's allocators for CPU and mps, CUDA's driver, cuBLAS.
EXHAUSTED = ("not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def mib(num_bytes: float) -> float:
    """Bytes as MiB, to two decimals."""
    return round(num_bytes / MIB, 2)


def snapshot(stage: str, device: torch.device) -> dict[str, Any]:
    """Memory in use, in GiB.

    `cpu_gib` is the process's resident set now and `cpu_peak_gib` the largest since the process started;
    `gpu_gib` and `gpu_peak_gib` are what torch's allocator holds in tensors, None without a GPU (and, for
    the peak, on mps, which does not count it).
    """
    gpu, gpu_peak = _gpu_bytes(device)
    rounded = {
        "cpu_gib": psutil.Process().memory_info().rss,
        "gpu_gib": gpu,
        "cpu_peak_gib": _cpu_peak_bytes(),
        "gpu_peak_gib": gpu_peak,
    }
    return {"stage": stage, **{k: None if v is None else round(v / GIB, 3) for k, v in rounded.items()}}


def exhausted(error: BaseException) -> bool:
    """Whether an error says that there is no more memory, on the device or on the host."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in EXHAUSTED)


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


def _cpu_peak_bytes() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
