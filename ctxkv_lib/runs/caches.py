"""The caches of a run: mapped from their files, and on a GPU where there is room."""

from pathlib import Path

from ..files import read_tensors
from ..method.caches import StreamCache
from ..method.memory import GIB

HEADROOM_BYTES = GIB  # left free for what training itself needs
POOL_ROWS = 2**19  # positions in a pool of a cache that memory does not hold


def load_caches(folder: Path) -> dict[str, StreamCache]:
    """Map the caches of both streams, "train" and "val", on the CPU; raises as `read_tensors`."""
    found = {}
    for split in ("train", "val"):
        contexts = read_tensors(folder / f"{split}_ctx.safetensors")["contexts"]
        held = read_tensors(folder / f"{split}_emb.safetensors")
        found[split] = StreamCache(held["ids"], contexts, held.get("embeddings"))
    return found
