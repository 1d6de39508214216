"""The four caches of Phase 2: contexts and embeddings of the training and the validation stream."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_tensors, write_tensors
from ..memory import mib
from ..model.modeling import ContextKVConfig, ContextKVForCausalLM
from ..model.windows import window_rows
from .placement import fits, free_bytes

CHECKED_ROWS = 65_536  # contexts looked at together when a cache is loaded


@dataclass(frozen=True)
class Batch:
    """What Phase 2 reads at n positions of a stream.

    Attributes:
        inputs: the tokens, int32 `[n]`, or their normed embeddings, float32 `[n, hidden_size]`.
        window: contexts that each position sees, `[n, max_contexts, context_dim]`, zero where there is none.
        present: bool `[n, max_contexts]`, the slots that hold a context.
        targets: next tokens, int64 `[n]`.
    """

    inputs: Tensor
    window: Tensor
    present: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def attend(self, model: ContextKVForCausalLM) -> tuple[Tensor, Tensor]:
        """`model.attend` at these positions: hidden states and attention weights."""
        embeddings = self.inputs if self.inputs.is_floating_point() else model.embed(self.inputs)
        return model.attend(embeddings, self.window, self.present)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(change(self.inputs), change(self.window), change(self.present), change(self.targets))


@dataclass
class StreamCache:
    """What Phase 2 reads of one stream of n + 1 tokens: n inputs, each with its target.

    Attributes:
        ids: int32 `[n + 1]`, the tokens; position i reads token i and predicts token i + 1.
        contexts: float32 or bfloat16 `[n + 1, context_dim]`, padded (see `windows`).
        embeddings: float32 `[n, hidden_size]`, normed (the published layout), or None: gathered from the
            model's own table, which gives the same rows.
        begins: int64 `[n]`, the position at which each position's conversation begins, where conversations
            are read apart; None for one stream without boundaries, as in training.
    """

    ids: Tensor
    contexts: Tensor
    embeddings: Tensor | None = None
    begins: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids) - 1

    @property
    def device(self) -> torch.device:
        """Where it is held; the model may compute elsewhere."""
        return self.contexts.device

    def gather(self, positions: Tensor, shape: ContextKVConfig) -> Batch:
        """What is read at `positions`, int64 `[n]`, all on this cache's device."""
        begins = 0 if self.begins is None else self.begins[positions]
        rows = window_rows(positions - begins, shape.interval, shape.max_contexts, shape.anchor)
        present = rows > 0
        if self.begins is not None:
            rows = torch.where(present, rows + self.begins[positions][:, None], 0)
        inputs = self.ids if self.embeddings is None else self.embeddings
        return Batch(inputs[positions], self.contexts[rows], present, self.ids[positions + 1].long())

    def batches(self, order: Tensor, size: int, model: ContextKVForCausalLM) -> Iterator[Batch]:
        """The positions of `order` in batches on the model's device.

        A cache that is held elsewhere is read one batch ahead, by a thread, through pinned memory.
        """
        parts = order.to(self.device).split(size)
        if self.device == model.device:
            yield from (self.gather(part, model.config) for part in parts)
            return

        def read(part: Tensor) -> Batch:
            batch = self.gather(part, model.config)
            return batch.pin_memory() if model.device.type == "cuda" else batch

        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(read, parts[0])
            for following in parts[1:]:
                batch, ahead = ahead.result(), reader.submit(read, following)
                yield batch.to(model.device)
            yield ahead.result().to(model.device)

    def attend(self, model: ContextKVForCausalLM, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`model.attend` at `positions`: hidden states and attention weights."""
        return self.gather(positions, model.config).to(model.device).attend(model)

    @property
    def embedding_bytes(self) -> int:
        return self.ids.nbytes + (0 if self.embeddings is None else self.embeddings.nbytes)

    @property
    def nbytes(self) -> int:
        return self.contexts.nbytes + self.embedding_bytes

    def to(self, device: torch.device) -> "StreamCache":
        dense = None if self.embeddings is None else self.embeddings.to(device)
        return StreamCache(self.ids.to(device), self.contexts.to(device), dense)


@torch.no_grad()
def dense_embeddings(model: ContextKVForCausalLM, ids: Tensor) -> Tensor:
    """One normed embedding row for each input token: float32 `[n, hidden_size]` from ids `[n + 1]`."""
    return torch.cat([model.embed(part) for part in ids[:-1].split(8192)])


def save_cache(folder: Path, split: str, cache: StreamCache) -> None:
    """Write `{split}_ctx.safetensors` and `{split}_emb.safetensors`; `load_cache` reads them back."""
    embeddings = {"ids": cache.ids}
    if cache.embeddings is not None:
        embeddings["embeddings"] = cache.embeddings
    write_tensors(folder / f"{split}_ctx.safetensors", {"contexts": cache.contexts})
    write_tensors(folder / f"{split}_emb.safetensors", embeddings)


def load_cache(folder: Path, split: str) -> StreamCache:
    """The cache of `split`, on the CPU, mapped from its files.

    Raises:
        UserError: a file is missing, damaged or does not fit the other.
    """
    from safetensors import SafetensorError

    try:
        contexts = read_tensors(folder / f"{split}_ctx.safetensors")["contexts"]
        stored = read_tensors(folder / f"{split}_emb.safetensors")
        cache = StreamCache(stored["ids"], contexts, stored.get("embeddings"))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"Cache of {split} in {folder} cannot be read ({error}); {_REBUILD}") from None
    finite = all(part.isfinite().all() for part in contexts.split(CHECKED_ROWS))
    if len(contexts) != len(cache.ids) or not finite:
        raise UserError(f"Cache of {split} in {folder} is damaged; {_REBUILD}")
    return cache


def place_caches(caches: dict[str, StreamCache], device: torch.device) -> tuple[dict[str, StreamCache], str]:
    """Loaded caches on the device if they fit there, else left in their mapped files; and which, in words.

    On a CPU they always stay mapped: the system keeps of them in memory what there is room for.
    """
    size = sum(cache.nbytes for cache in caches.values())
    held, free = f"{mib(size):,.0f} MiB", f"{mib(free_bytes(device)):,.0f} MiB free"
    if device.type == "cpu":
        return caches, f"{held} mapped from their files, {free} in memory"
    if not fits(size, device):
        return caches, f"{held} mapped from their files and read ahead, since {device.type} has {free}"
    return {split: cache.to(device) for split, cache in caches.items()}, f"{held} on {device.type}, {free}"


_REBUILD = "delete that folder and run again to rebuild it."


def held_mib(train: StreamCache, validation: StreamCache) -> dict[str, float]:
    """MiB that the caches really hold."""
    sizes = {
        "train_ctx": train.contexts.nbytes,
        "train_emb": train.embedding_bytes,
        "val_ctx": validation.contexts.nbytes,
        "val_emb": validation.embedding_bytes,
    }
    return {**{name: mib(size) for name, size in sizes.items()}, "total": mib(sum(sizes.values()))}
