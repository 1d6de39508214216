"""What a result came from: versions, device, commit, and the code that made it."""

import hashlib
import json
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch

from .. import ranks
from ..errors import UserError

PACKAGE = Path(__file__).parent.parent
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPORTED = ("torch", "transformers", "datasets", "numpy")


def choose_device(name: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu.

    Raises:
        UserError: the named device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        found = ", ".join(kind for kind, available in there.items() if available)
        raise UserError(f"runtime.device is {name!r}, which this machine lacks; allowed here: auto, {found}.")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    return f"{device.type} ({processor}, {threads} thread{'s' if threads > 1 else ''})"


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in REPORTED}}


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, `-dirty` if changed, or that pip installed it from.

    None for a package from elsewhere.
    """
    if not (PACKAGE.parent / ".git").exists():
        return _installed_commit()
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _installed_commit() -> str | None:
    """What `pip install git+https://...` recorded (PEP 610)."""
    try:
        recorded = distribution("ctxkv_lib").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(recorded).get("vcs_info", {}).get("commit_id") if recorded else None


def code_version(*modules: str) -> str:
    """Changes when the source of any of these modules of the package (`room/module`) does."""
    source = b"".join((PACKAGE / f"{name}.py").read_bytes() for name in modules)
    return hashlib.sha256(source).hexdigest()[:16]


def describe(
    device: torch.device, seed: int, data: dict[str, Any], embeddings: dict[str, Any]
) -> dict[str, Any]:
    """The `provenance` of a summary."""
    return {
        "seed": seed,
        "date": date.today().isoformat(),
        "versions": versions(),
        "device": device_name(device),
        "processes": ranks.count(),
        "git_commit": git_commit(),
        "data": data,
        "embeddings": embeddings,
    }
