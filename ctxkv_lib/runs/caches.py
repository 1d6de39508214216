"""The caches of a run as files, and where they are held while Phase 2 reads them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..errors import is_out_of_memory
from ..files import read_tensors, write_tensors
from ..method.caches import Batch, Shard, StreamCache
from ..method.memory import GIB, mib
from ..method.model import ContextKV

HEADROOM_BYTES = GIB  # left free for what training itself needs


def save_cache(folder: Path, split: str, cache: StreamCache) -> None:
    """Write `{split}_ctx.safetensors` and `{split}_emb.safetensors`, for `load_cache`."""
    files: dict[str, dict[str, Tensor | None]] = {
        "ctx": {"contexts": cache.contexts},
        "emb": {"ids": cache.ids, "embeddings": cache.embeddings},
    }
    for part, held in files.items():
        tensors = {name: tensor for name, tensor in held.items() if tensor is not None}
        write_tensors(folder / f"{split}_{part}.safetensors", tensors)


def load_cache(folder: Path, split: str) -> StreamCache:
    """Map the cache of `split` from its files, on the CPU.

    Raises:
        DamagedFile: a file is not what `save_cache` wrote.
        FileNotFoundError: there is none.
    """
    contexts, stored = _read(folder, split, "ctx")["contexts"], _read(folder, split, "emb")
    return StreamCache(stored["ids"].int(), contexts, stored.get("embeddings"))


def load_ids(folder: Path, split: str) -> Tensor:
    """Map all token ids of `split`, of the dtype in which they were saved. Raises as `load_cache`."""
    return _read(folder, split, "emb")["ids"]


def _read(folder: Path, split: str, part: str) -> dict[str, Tensor]:
    return read_tensors(folder / f"{split}_{part}.safetensors")


def held_mib(train: StreamCache, validation: StreamCache) -> dict[str, float]:
    """Return the MiB that the caches hold."""
    sizes = {}
    for split, cache in {"train": train, "val": validation}.items():
        sizes[f"{split}_ctx"] = cache.contexts.nbytes
        sizes[f"{split}_emb"] = cache.nbytes - cache.contexts.nbytes
    return {**{name: mib(size) for name, size in sizes.items()}, "total": mib(sum(sizes.values()))}


class ReadAhead(StreamCache):
    """A cache on another device than the model; a thread gathers one batch ahead."""

    def batches(
        self, order: Tensor, size: int, model: ContextKV, shard: Shard | None = None
    ) -> Iterator[Batch]:
        gathered = super().batches(order, size, model, shard)
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(next, gathered, None)
            while (batch := ahead.result()) is not None:
                ahead = reader.submit(next, gathered, None)
                yield batch


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be taken; mps shares the host's."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()  # of what torch keeps for later
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _moved(cache: StreamCache, device: torch.device) -> StreamCache | None:
    """Return the cache on a device; None if there is no room, or too little although it looked enough."""
    if cache.nbytes + HEADROOM_BYTES > free_bytes(device):
        return None
    try:
        return cache.each(lambda tensor: tensor.to(device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def place_caches(caches: dict[str, StreamCache], device: torch.device) -> tuple[dict[str, StreamCache], str]:
    """Move loaded caches to the device where there is room, the smallest split first.

    A split's tensors stay together. A split that does not fit stays mapped from its files, with batches read
    ahead.

    Returns:
        the caches, and a sentence on where they are held.
    """
    if device.type == "cpu":
        total = sum(cache.nbytes for cache in caches.values())
        return caches, f"{mib(total):,.0f} MiB mapped from their files"
    words = []
    placed = dict(caches)
    for split, held in sorted(caches.items(), key=lambda item: item[1].nbytes):
        free = free_bytes(device)
        moved = _moved(held, device)
        is_plain = type(held) is StreamCache  # rows of tokens are small
        placed[split] = moved or (
            ReadAhead(held.ids, held.contexts, held.embeddings, held.pool) if is_plain else held
        )
        mapped = "mapped from its files" + ", read ahead" * is_plain
        where = f"on {device.type}" if moved else mapped
        words.append(f"{split} {mib(held.nbytes):,.0f} MiB {where} ({mib(free):,.0f} MiB free)")
    return placed, ", ".join(words)
