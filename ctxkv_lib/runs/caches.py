"""The caches of a run: mapped from their files, and on a GPU where there is room."""

from dataclasses import replace
from pathlib import Path

import psutil
import torch

from ..files import read_tensors
from ..method.caches import StreamCache
from ..method.memory import GIB, mib

HEADROOM_BYTES = GIB  # left free for what training itself needs
POOL = 2**19  # positions that are shuffled together where memory does not hold the cache


def load_caches(folder: Path) -> dict[str, StreamCache]:
    """Map the caches of both streams, "train" and "val", on the CPU; raises as `read_tensors`."""
    found = {}
    for split in ("train", "val"):
        contexts = read_tensors(folder / f"{split}_ctx.safetensors")["contexts"]
        held = read_tensors(folder / f"{split}_emb.safetensors")
        found[split] = StreamCache(held["ids"], contexts, held.get("embeddings"))
    return found


def place_caches(caches: dict[str, StreamCache], device: torch.device) -> tuple[dict[str, StreamCache], str]:
    """Move caches to a GPU where there is room, the smallest first; the others stay mapped from their files.

    Returns:
        the caches, and a sentence on where they are held.
    """
    placed, words = dict(caches), []
    for split, cache in sorted(caches.items(), key=lambda item: item[1].nbytes):
        where = "mapped from its files"
        if device.type != "cpu" and cache.nbytes + HEADROOM_BYTES <= free_bytes(device):
            placed[split], where = cache.each(lambda tensor: tensor.to(device)), f"on {device.type}"
        elif cache.nbytes > psutil.virtual_memory().available:
            placed[split] = replace(cache, pool=POOL)  # in reading order within a pool, a disk keeps up
        words.append(f"{split} {mib(cache.nbytes):,.0f} MiB {where}")
    return placed, ", ".join(words)


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be taken on a device; mps shares the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
