"""The four caches of Phase 2: contexts and embeddings of the training and the validation stream."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import UserError
from .files import read_tensors, write_tensors
from .memory import mib
from .modeling import ContextKVForCausalLM
from .windows import window_rows

FLOAT32_BYTES = 4


@dataclass
class StreamCache:
    """What Phase 2 reads of one stream of n + 1 tokens: n inputs, each with its target.

    Attributes:
        ids: int32 `[n + 1]`, the tokens; position i reads token i and predicts token i + 1.
        contexts: float32 `[n + 1, context_dim]`, padded (see `windows`).
        embeddings: float32 `[n, hidden_size]`, normed (the seed's layout), or None: gathered from the
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
        return self.contexts.device

    def targets(self, positions: Tensor) -> Tensor:
        """Next tokens, int64 `[len(positions)]`."""
        return self.ids[positions + 1].long()

    def attend(self, model: ContextKVForCausalLM, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`model.attend` at `positions`: hidden states and attention weights."""
        shape = model.config
        begins = 0 if self.begins is None else self.begins[positions]
        rows = window_rows(positions - begins, shape.interval, shape.max_contexts, shape.anchor)
        present = rows > 0
        if self.begins is not None:
            rows = torch.where(present, rows + self.begins[positions][:, None], 0)
        if self.embeddings is None:
            embeddings = model.embed(self.ids[positions])
        else:
            embeddings = self.embeddings[positions]
        return model.attend(embeddings, self.contexts[rows], present)

    def embedding_bytes(self) -> int:
        return self.ids.nbytes + (0 if self.embeddings is None else self.embeddings.nbytes)

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
    """The cache of `split`, on the CPU.

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
    if len(cache.contexts) != len(cache.ids) or not cache.contexts.isfinite().all():
        raise UserError(f"Cache of {split} in {folder} is damaged; {_REBUILD}")
    return cache


_REBUILD = "delete that folder and run again to rebuild it."


def held_mib(train: StreamCache, validation: StreamCache) -> dict[str, float]:
    """MiB that the caches really hold."""
    return _with_total(
        {
            "train_ctx": train.contexts.nbytes,
            "train_emb": train.embedding_bytes(),
            "val_ctx": validation.contexts.nbytes,
            "val_emb": validation.embedding_bytes(),
        }
    )


def dense_fp32_mib(train_tokens: int, val_tokens: int, model: ModelConfig) -> dict[str, float]:
    """MiB of the seed's layout: one fp32 context and one fp32 embedding row for each input token."""
    sizes = {}
    for split, tokens in (("train", train_tokens), ("val", val_tokens)):
        sizes[f"{split}_ctx"] = (tokens - 1) * model.context_dim * FLOAT32_BYTES
        sizes[f"{split}_emb"] = (tokens - 1) * model.hidden_size * FLOAT32_BYTES
    return _with_total(sizes)


def _with_total(sizes: dict[str, int]) -> dict[str, float]:
    return {**{name: mib(size) for name, size in sizes.items()}, "total": mib(sum(sizes.values()))}
