"""Batches of baselines that compute what they remember: rows of consecutive tokens, not single positions."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..hf.configuration import ContextKVConfig
from ..method.caches import Movable, StreamCache, epoch_seed
from ..method.model import NOT_DRAWN, Dropout
from .memories import own_rows

CHUNK = 64  # consecutive positions that an epoch visits together
LONGEST_ROW = 256  # positions that are answered at in one row


class Reader(Protocol):
    """A baseline's model."""

    def read(self, batch: "RowBatch", dropout: Dropout = NOT_DRAWN) -> Tensor:
        """Hidden states at the batch's positions, `[n, hidden_size]`."""


@dataclass(frozen=True)
class RowBatch(Movable):
    """n positions of a stream, in r rows.

    Attributes:
        ids: int32 `[r, T]`, the tokens at these positions, those before, and padding behind.
        spans: int64 `[r, 2]`, the columns of a row that are among the n, first and one past the last.
        first: int64 `[r]`, the position in the stream of each row's first column.
        targets: next tokens, int64 `[n]`.
    """

    ids: Tensor
    spans: Tensor
    first: Tensor
    targets: Tensor

    @property
    def tokens(self) -> Tensor:
        """Those at the positions, int32 `[n]`."""
        return own_rows(self.ids, self.spans)

    def attend(self, model: Reader, dropout: Dropout = NOT_DRAWN) -> tuple[Tensor, None]:
        """Hidden states at these positions, and no attention weights."""
        return model.read(self, dropout), None


@dataclass
class TokenRows(StreamCache):
    """A stream of n + 1 tokens whose contexts, of no width, only say the precision of training.

    Attributes:
        history: tokens that a row has before the first position that is answered at, fewer at the beginning.
    """

    history: int = 0

    def tensors(self) -> dict[str, Tensor]:
        return {"ids": self.ids, "contexts": self.contexts}

    def epoch_order(self, seed: int, number: int) -> Tensor:
        """A permutation of chunks, which lie differently in each epoch: positions, int64 `[n]` on the CPU."""
        generator = torch.Generator().manual_seed(epoch_seed(seed, number))
        shift = int(torch.randint(CHUNK, (), generator=generator))
        positions = torch.arange(len(self))
        chunks = [positions[:shift], *positions[shift:].split(CHUNK)]
        return torch.cat([chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()])

    def gather(self, positions: Tensor, shape: ContextKVConfig) -> RowBatch:  # type: ignore[override]
        """Rows for `positions`, int64 `[n]`: one for each run of consecutive ones, or for a piece of it."""
        breaks = (positions.diff() != 1).nonzero().flatten() + 1
        runs = positions.cpu().tensor_split(breaks.cpu())
        spans, first, rows = [], [], []
        for part in (part for run in runs for part in run.split(LONGEST_ROW)):
            start, stop = int(part[0]), int(part[-1]) + 1
            first.append(max(0, start - self.history))
            spans.append((start - first[-1], stop - first[-1]))
            rows.append(self.ids[first[-1] : stop])
        targets = self.ids[(positions + 1).to(self.ids.device)].long()
        device = self.ids.device
        return RowBatch(
            pad_sequence(rows, batch_first=True),
            torch.tensor(spans, device=device),
            torch.tensor(first, device=device),
            targets,
        )
