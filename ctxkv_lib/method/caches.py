"""The four caches of Phase 2: contexts and embeddings of the training and the validation stream."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from .. import ranks
from ..errors import DamagedFile
from ..files import read_tensors, write_tensors
from ..hf.modeling import NOT_DRAWN, ContextKVConfig, ContextKVForCausalLM, Dropout
from .memory import mib
from .windows import window_rows


@dataclass(frozen=True)
class Movable:
    """Tensors of a batch, which move together."""

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self._each(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        held = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(tensor if tensor is None else change(tensor) for tensor in held))


@dataclass(frozen=True)
class Batch(Movable):
    """What Phase 2 reads at n positions of a stream.

    Attributes:
        tokens: int32 `[n]`.
        embeddings: their normed embeddings, float32 `[n, hidden_size]`, or None: gathered from the table.
        window: contexts that each position sees, `[n, max_contexts, context_dim]`, zero where there is none.
        present: bool `[n, max_contexts]`, the slots that hold a context.
        targets: next tokens, int64 `[n]`.
    """

    tokens: Tensor
    embeddings: Tensor | None
    window: Tensor
    present: Tensor
    targets: Tensor

    def attend(self, model: ContextKVForCausalLM, dropout: Dropout = NOT_DRAWN) -> tuple[Tensor, Tensor]:
        """`model.attend` at these positions: hidden states and attention weights."""
        embeddings = model.embed(self.tokens) if self.embeddings is None else self.embeddings
        return model.attend(embeddings, self.window, self.present, dropout)


def epoch_seed(seed: int, epoch: int) -> int:
    """What an epoch's order and dropout are drawn from, for any seed within what torch takes."""
    return (seed * 1_000_003 + epoch) % 2**63


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of all `count` positions in which an epoch visits them, int64 on the CPU."""
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    return torch.randperm(count, generator=generator)


class TrainingStream(Protocol):
    """What Phase 2 trains on: a `StreamCache`, or contexts that are made when they are needed."""

    def __len__(self) -> int:
        """Positions that an epoch visits, each once."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its contexts, and thereby of the matrix products of training."""

    def epoch(
        self, seed: int, number: int, done: int, size: int, model: ContextKVForCausalLM, pieces: int = 1
    ) -> Iterator[Batch]:
        """An epoch's batches on the model's device, in an order drawn from (seed, number) alone.

        Of several processes each gets its part of every batch: `ranks.share` of its rows.

        Args:
            done: positions that are left out, those of the first batches.
            size: positions of a batch; only the last one may have fewer.
            pieces: each batch comes in so many (or fewer).
        """


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
        """Where its contexts are held; the model may compute elsewhere, and the rest be held elsewhere."""
        return self.contexts.device

    @property
    def dtype(self) -> torch.dtype:
        return self.contexts.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Everything it holds, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def gather(self, positions: Tensor, shape: ContextKVConfig) -> Batch:
        """What is read at `positions`, int64 `[n]` on any device; each tensor from where it is held."""
        begins = 0 if self.begins is None else _rows(self.begins, positions)
        rows = window_rows(positions - begins, shape)
        present = rows > 0
        if self.begins is not None:
            rows = torch.where(present, rows + _rows(self.begins, positions)[:, None], 0)
        dense = None if self.embeddings is None else _rows(self.embeddings, positions)
        tokens, targets = (_rows(self.ids, places) for places in (positions, positions + 1))
        return Batch(tokens, dense, _rows(self.contexts, rows), present, targets.long())

    def batches(
        self, order: Tensor, size: int, model: ContextKVForCausalLM, pieces: int = 1
    ) -> Iterator[Batch]:
        """The positions of `order` in batches on the model's device, each in so many pieces (or fewer).

        A cache that is held elsewhere is read one piece ahead, by a thread, through pinned memory.
        """
        batches = order.to(self.device).split(size)
        parts = [part for batch in batches for part in batch.split(-(-size // pieces))]
        if all(tensor.device == model.device for tensor in self.tensors().values()):
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

    def epoch(
        self, seed: int, number: int, done: int, size: int, model: ContextKVForCausalLM, pieces: int = 1
    ) -> Iterator[Batch]:
        """As in `TrainingStream`, in the order of `epoch_order`."""
        return self.shared_batches(self.epoch_order(seed, number)[done:], size, model, pieces)

    def shared_batches(
        self, order: Tensor, size: int, model: ContextKVForCausalLM, pieces: int = 1
    ) -> Iterator[Batch]:
        """`batches`, but of each batch only the rows that are this process's."""
        whole = len(order) // size * size
        ours, left = ranks.share(size), order[whole:]
        order = torch.cat([order[:whole].view(-1, size)[:, ours].flatten(), left[ranks.share(len(left))]])
        return self.batches(order, ours.stop - ours.start, model, pieces)

    def epoch_order(self, seed: int, number: int) -> Tensor:
        """In which an epoch visits all positions, int64 `[n]` on the CPU."""
        return epoch_order(len(self), seed, number)

    def attend(self, model: ContextKVForCausalLM, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`model.attend` at `positions`: hidden states and attention weights."""
        return self.gather(positions, model.config).to(model.device).attend(model)

    @property
    def embedding_bytes(self) -> int:
        return self.ids.nbytes + (0 if self.embeddings is None else self.embeddings.nbytes)

    @property
    def nbytes(self) -> int:
        return self.contexts.nbytes + self.embedding_bytes


def _rows(held: Tensor, rows: Tensor) -> Tensor:
    """These rows of a tensor, wherever it is held."""
    return held[rows.to(held.device)]


@torch.no_grad()
def dense_embeddings(model: ContextKVForCausalLM, ids: Tensor) -> Tensor:
    """One normed embedding row for each input token: float32 `[n, hidden_size]` from ids `[n + 1]`."""
    return torch.cat([model.embed(part) for part in ids[:-1].split(8192)])


def save_cache(folder: Path, split: str, cache: StreamCache, starts: Tensor | None = None) -> None:
    """Write `{split}_ctx.safetensors` and `{split}_emb.safetensors`; `load_cache` reads them back.

    Args:
        cache: of a streamed stream all ids, and the contexts of its beginning.
        starts: of a streamed stream the contexts that it is read on from (see `streamed`).
    """
    embeddings = {"ids": cache.ids}
    if cache.embeddings is not None:
        embeddings["embeddings"] = cache.embeddings
    contexts = {"contexts": cache.contexts}
    if starts is not None:
        contexts["starts"] = starts
    write_tensors(folder / f"{split}_ctx.safetensors", contexts)
    write_tensors(folder / f"{split}_emb.safetensors", embeddings)


def load_cache(folder: Path, split: str) -> StreamCache:
    """The cache of `split`, on the CPU, mapped from its files; of a streamed stream only the beginning.

    Raises:
        DamagedFile: a file is missing or not what `save_cache` wrote.
    """
    contexts, stored = _read(folder, split, "ctx")["contexts"], _read(folder, split, "emb")
    return StreamCache(stored["ids"][: len(contexts)].int(), contexts, stored.get("embeddings"))


def load_ids(folder: Path, split: str) -> Tensor:
    """The token ids of `split`, all of them, in whatever integers they were saved. Raises as `load_cache`."""
    return _read(folder, split, "emb")["ids"]


def load_starts(folder: Path, split: str) -> Tensor | None:
    """What a streamed `split` is read on from; None if it is not streamed. Raises as `load_cache`."""
    return _read(folder, split, "ctx").get("starts")


def _read(folder: Path, split: str, part: str) -> dict[str, Tensor]:
    try:
        return read_tensors(folder / f"{split}_{part}.safetensors")
    except FileNotFoundError as error:
        raise DamagedFile(Path(error.filename), "it is missing") from None


def held_mib(train: StreamCache, validation: StreamCache, starts: Tensor | None = None) -> dict[str, float]:
    """MiB that the caches really hold; `starts` as in `save_cache`."""
    sizes = {
        "train_ctx": train.contexts.nbytes + (0 if starts is None else starts.nbytes),
        "train_emb": train.embedding_bytes,
        "val_ctx": validation.contexts.nbytes,
        "val_emb": validation.embedding_bytes,
    }
    return {**{name: mib(size) for name, size in sizes.items()}, "total": mib(sum(sizes.values()))}
