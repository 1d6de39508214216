"""Where a result comes from: device, precision, threads, versions and commit."""

import json
import platform
import subprocess
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch

from .. import ranks
from ..errors import UserError
from .experiment import Work

PACKAGE = Path(__file__).parent.parent
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and of Arm, in /proc/cpuinfo
REPORTED = ("torch", "transformers", "numpy")


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


def provenance(work: Work, placement: str) -> dict[str, Any]:
    """Describe what a result was made from, and where; `placement` is that of the caches."""
    texts = {split: text.fingerprint for split, text in work.texts.items() if split != "test"}
    return {
        "seed": work.config.runtime.seed,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in REPORTED}},
        "device": _device_name(work.device),
        "processes": ranks.world_size(),
        "git_commit": git_commit(),
        "data": {
            "source": work.config.data.source,
            **{f"{split}_fingerprint": each for split, each in texts.items()},
        },
        "embeddings": {"table": work.config.data.table, "fingerprint": work.table.fingerprint},
        "precision": work.precision,
        "threads": torch.get_num_threads(),
        "caches": placement,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    return f"{device.type} ({processor}, {threads} thread{'s' if threads > 1 else ''})"


def git_commit() -> str | None:
    """Return the commit of this package's checkout (12 digits, `-dirty` if the package's files are others),
    or the one that pip installed; None if neither is known.
    """
    if not (PACKAGE.parent / ".git").exists():
        return _installed_commit()
    git = ["git", "-C", str(PACKAGE)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True)
        return found.stdout.decode().strip() + ("-dirty" if changed.returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _installed_commit() -> str | None:
    """Return what `pip install git+https://...` recorded (PEP 610)."""
    try:
        recorded = distribution("ctxkv_lib").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    commit = json.loads(recorded or "{}").get("vcs_info", {}).get("commit_id")
    return commit and commit[:12]
