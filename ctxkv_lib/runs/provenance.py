"""Describe where a result comes from: device, precision, threads, versions and commit."""

import platform
import subprocess
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

from ..files import PACKAGE
from .plan import Plan

REPORTED = ("torch", "transformers", "numpy")


def provenance(plan: Plan, placement: str) -> dict[str, Any]:
    """Describe how and where a result was computed. `placement` says where the streams were."""
    config = plan.config
    texts = {split: text.fingerprint for split, text in plan.texts.items() if split != "test"}
    return {
        "seed": config.runtime.seed,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in REPORTED}},
        "device": _device_name(plan.device),
        "git_commit": git_commit(),
        "data": {
            "source": config.data.source,
            **{f"{split}_fingerprint": fingerprint for split, fingerprint in texts.items()},
        },
        "embeddings": {"table": config.data.table},
        "precision": plan.precision,
        "threads": torch.get_num_threads(),
        "caches": placement,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    return f"{device.type} ({processor}, {threads} thread{'s' if threads > 1 else ''})"


def git_commit() -> str | None:
    """Return the git commit of this package's checkout (12 digits), or None if it is not in a checkout.

    If the package's files differ from the commit, `-dirty` follows the digits.
    """
    if not (PACKAGE.parent / ".git").exists():
        return None
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(PACKAGE)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True)
        return head.stdout.decode().strip() + ("-dirty" if changed.returncode else "")
    return None
