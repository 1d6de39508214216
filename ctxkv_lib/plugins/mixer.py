"""Mixers: models that read rows of tokens instead of contexts.

`ctxkv.run(config, mixer=MyMixer)` takes an `nn.Module` made from a `ModelConfig` (and `settings`, if its
class has `Settings`), all of which Phase 2 trains. It is called as `mixer(embeddings, start)`:

- `embeddings`: normed token embeddings of rows of consecutive tokens, `[rows, length, hidden_size]`;
- `start`: the first column whose hidden state is asked for;
- it returns hidden states for the output head, `[rows, length - start, hidden_size]`; that of a column must
  not depend on later columns.

Where a mixer is, `config.has_contexts` and `model.has_contexts` are False. A recipe's block and attention are
left out, and given ones refused (`runs.config`); Phase 1 trains nothing, caches have no contexts, the test
reads none, and a stream may be shorter than a window (`runs.stages`, `build`, `experiment`); an epoch visits
chunks of positions, and nothing is copied (below); more than one process is refused (`experiments`); there is
no folder for transformers, hence no generation and no `ctxkv evaluate` (`runs.export`), and nothing to probe
(`measure.measurements`). A report shows no window, since `slot_offsets` is None. Weights lie in
`attention.safetensors`, since a mixer stands in attention's place.

Its attribute `history`, 0 by default, is the largest number of tokens before a position that it reads in
training; `evaluation_history`, by default the same, is that number in evaluation. Its `init_weights`, if it
has one, is called before Phase 2 as that of a block before Phase 1 (see `ContextBlock.init_weights`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..method.caches import TokenCache
from ..method.config import ModelConfig, Phase1Config
from ..method.contexts import distinct_rows
from ..method.model import ContextKV

CHUNK = 64  # consecutive positions that an epoch of a mixer visits together
LONGEST_ROW = 256  # positions that one row asks for


class MixerModel(ContextKV):
    """Frozen token table, a mixer in the place of `attention`, output tied to the table."""

    has_contexts = False

    def __init__(
        self,
        config: ModelConfig,
        mixer: Callable[[ModelConfig], nn.Module],
        vocab_size: int,
        has_unigram: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.build_frozen(config, vocab_size, has_unigram)
        self.attention = mixer(config)
        self.set_phase(2)

    def set_phase(self, phase: Literal[1, 2]) -> None:
        self.requires_grad_(False)
        self.attention.requires_grad_(phase == 2)

    @property
    def slot_offsets(self) -> None:
        return None

    def history(self, training: bool) -> int:
        """Return how many tokens the mixer reads before a position, in training or in evaluation."""
        in_training = getattr(self.attention, "history", 0)
        return in_training if training else getattr(self.attention, "evaluation_history", in_training)

    def cached_stream(self, cache: TokenCache, training: bool) -> "TokenRows":
        return TokenRows(cache.ids, self.history(training), chunk=CHUNK)

    def init_attention(self, ids: Tensor, config: Phase1Config) -> None:
        init: Callable[..., None] | None = getattr(self.attention, "init_weights", None)
        if init:
            init(*distinct_rows(self, ids), config)


@dataclass(frozen=True)
class RowBatch:
    """n positions of a stream, in r rows.

    Attributes:
        ids: int32 `[r, T]`, the tokens at these positions, those before, and padding behind.
        spans: first and one past the last column of each row that are among the n.
        targets: next tokens, int64 `[n]`.
    """

    ids: Tensor
    spans: list[tuple[int, int]]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def tokens(self) -> Tensor:
        """Return the tokens at the positions, int32 `[n]`."""
        return self._at_positions(self.ids)

    def attend(self, model: MixerModel) -> tuple[Tensor, None]:
        """Compute hidden states at the positions, `[n, hidden_size]`; there are no attention weights."""
        start = min(first for first, _ in self.spans)
        return self._at_positions(model.attention(model.embed(self.ids), start), start), None

    def logits(self, model: MixerModel) -> Tensor:
        """Compute the logits at the positions, `[n, vocab_size]`."""
        return model.logits(self.attend(model)[0], self.tokens)

    def scores(self, model: MixerModel) -> tuple[Tensor, Tensor]:
        """Compute `model.losses` at the positions: loss and correctness of each prediction."""
        return model.losses(self.attend(model)[0], self.tokens, self.targets)

    def _at_positions(self, rows: Tensor, start: int = 0) -> Tensor:
        """Concatenate the columns within each row's span, from rows `[T - start, ...]`: `[n, ...]`."""
        return torch.cat([row[a - start : b - start] for row, (a, b) in zip(rows, self.spans, strict=True)])

    def to(self, device: torch.device) -> Self:
        return type(self)(self.ids.to(device), self.spans, self.targets.to(device))


@dataclass(frozen=True)
class TokenRows(TokenCache):
    """A cached stream as a mixer reads it: rows of tokens.

    Attributes:
        history: tokens that a row has before the first position that is asked for, fewer at the beginning.
    """

    history: int = 0

    def batch(self, positions: Tensor, model: Any = None) -> RowBatch:
        """Gather rows for `positions`, int64 `[n]`: one for each run of consecutive ones, or a part of it."""
        breaks = (positions.diff() != 1).nonzero().flatten() + 1
        runs = positions.cpu().tensor_split(breaks.cpu())
        spans, rows = [], []
        for part in (part for run in runs for part in run.split(LONGEST_ROW)):
            start, stop = int(part[0]), int(part[-1]) + 1
            first = max(0, start - self.history)
            spans.append((start - first, stop - first))
            rows.append(self.ids[first:stop])
        targets = self.ids[(positions + 1).to(self.ids.device)].long()
        return RowBatch(pad_sequence(rows, batch_first=True), spans, targets)
