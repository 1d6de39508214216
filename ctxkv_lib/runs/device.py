"""Choose a run's device, precision and threads, and restore torch's state after the run."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import context, current_process
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..progress import log
from .folder import RunFolder

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


def precision_of_run(folder: RunFolder, name: str, device: torch.device) -> str:
    """Return the precision of a run, `fp32` or `bf16`.

    For a new run, `choose_precision` chooses the precision. A run that was begun earlier keeps its recorded
    precision if `name`, the setting `runtime.precision`, is `auto`. If the recorded precision is bf16 and the
    device does not support bf16 in hardware, a message is printed.

    The result is stored in `Inputs.precision`. The precision is the dtype of the cached training contexts
    (`stages._write_caches`) and of all matrix products in Phase 2's training (`phase2.batch_gradients`).
    Everything else is fp32. The records of the stages `contexts` and `phase2` contain the precision.
    """
    chosen = choose_precision(name, device)
    recorded = (record.made_from.get("precision") for record in folder.records.values())
    begun_in: str | None = next(filter(None, recorded), None)
    if begun_in is None or name != "auto":
        return chosen
    if (begun_in, chosen) == ("bf16", "fp32") and "phase2" not in folder.records:
        log(
            "This run was begun in bf16 and continues in bf16. This device does not support bf16 in "
            "hardware, so training is slow. A new run in another folder would train in fp32."
        )
    return begun_in


def choose_precision(name: str, device: torch.device) -> str:
    """Return `fp32` or `bf16`. `auto` selects bf16 if the processor or GPU supports it in hardware.

    `precision_of_run` calls this function for a run, and `report.times` calls it to estimate run times.
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
    """Set the number of torch's threads. In a forked process, always use one thread.

    Notebook launchers start processes by forking. A forked process has no OpenMP threads, but OpenMP would
    wait for them forever.
    """
    if isinstance(current_process(), getattr(context, "ForkProcess", ())):  # Windows has no forks
        torch.set_num_threads(1)
    elif threads != "auto":
        torch.set_num_threads(int(threads))
