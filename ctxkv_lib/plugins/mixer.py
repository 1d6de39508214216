"""Mixers: models that read rows of tokens instead of contexts.

`ctxkv.run(config, mixer=MyMixer)` takes an `nn.Module` made from a `ModelConfig` (and `settings`, if its
class has `Settings`), all of which Phase 2 trains. It is called as `mixer(embeddings, start)`:

- `embeddings`: normed token embeddings of rows of consecutive tokens, `[rows, length, hidden_size]`;
- `start`: the first column whose hidden state is asked for;
- it returns hidden states for the output head, `[rows, length - start, hidden_size]`; that of a column must
  not depend on later columns.

What a mixer changes; `config.has_contexts` and `model.has_contexts` are False:

- `runs.config`: no block, loss or attention beside it; `experiments`: one process only;
- `runs.build`: the model is a `MixerModel`, and caches have ids alone; `method.caches`: so they are
  `TokenCache`s, which gather `RowBatch`es; an epoch visits chunks of consecutive positions;
- `runs.stages`: Phase 1 is recorded as untrained, and no contexts are computed;
- `runs.export`, `runs.opened`: no `model/`, and nothing that needs it (`ctxkv generate`, `evaluate`); its
  weights lie in `attention.safetensors`, since it stands in attention's place;
- `measure`: no probe; `report`: no window, and no sizes of caches in `info` (`slot_offsets` is None).

Its attribute `history`, 0 by default, is the largest number of tokens before a position that it reads in
training; `evaluation_history`, by default the same, is that number in evaluation. Its `init_weights`, if it
has one, is called before Phase 2 as that of a block before Phase 1 (see `ContextBlock.init_weights`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..method.config import ModelConfig, Phase1Config
from ..method.contexts import distinct_rows
from ..method.model import ContextKV

LONGEST_ROW = 256  # positions that one row asks for


class MixerModel(ContextKV):
    """Frozen token table, a mixer in the place of `attention`, output tied to the table."""

    has_contexts = False
    chunk = 64

    def __init__(
        self,
        config: ModelConfig,
        mixer: Callable[[ModelConfig], nn.Module],
        vocab_size: int,
        has_unigram: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.build_frozen(config, vocab_size, has_unigram)
        self.context_block = self.feed_forward = None
        self.attention = mixer(config)
        self.set_phase(2)

    def history(self, training: bool) -> int:
        """Return how many tokens the mixer reads before a position, in training or in evaluation."""
        in_training = getattr(self.attention, "history", 0)
        return in_training if training else getattr(self.attention, "evaluation_history", in_training)

    def init_attention(self, ids: Tensor, config: Phase1Config) -> None:
        if init := getattr(self.attention, "init_weights", None):
            init(*distinct_rows(self, ids), config)

    def gather(self, ids: Tensor, positions: Tensor) -> "RowBatch":
        """Gather what is read of the stream `ids` at `positions`, int64 `[n]`.

        That is a row for each run of consecutive positions, or for a part of it.
        """
        breaks = (positions.diff() != 1).nonzero().flatten() + 1
        runs = positions.cpu().tensor_split(breaks.cpu())
        history, spans, rows = self.history(self.training), [], []
        for part in (part for run in runs for part in run.split(LONGEST_ROW)):
            start, stop = int(part[0]), int(part[-1]) + 1
            first = max(0, start - history)
            spans.append((start - first, stop - first))
            rows.append(ids[first:stop])
        tokens, targets = (ids[places.to(ids.device)] for places in (positions, positions + 1))
        return RowBatch(tokens, targets.long(), pad_sequence(rows, batch_first=True), spans)


@dataclass(frozen=True)
class RowBatch:
    """n positions of a stream, in r rows."""

    tokens: Tensor  # at these positions, int32 `[n]`
    targets: Tensor  # the next ones, int64 `[n]`
    rows: Tensor  # tokens at these positions, those before, and padding behind, int32 `[r, T]`
    spans: list[tuple[int, int]]  # first and one past the last column of each row that are among the n

    def __len__(self) -> int:
        return len(self.targets)

    def attend(self, model: MixerModel) -> tuple[Tensor, None]:
        """Compute hidden states at the positions, `[n, hidden_size]`; there are no attention weights."""
        start = min(first for first, _ in self.spans)
        hidden = zip(model.attention(model.embed(self.rows), start), self.spans, strict=True)
        return torch.cat([row[first - start : stop - start] for row, (first, stop) in hidden]), None

    def logits(self, model: MixerModel) -> Tensor:
        """Compute the logits at the positions, `[n, vocab_size]`."""
        return model.logits(self.attend(model)[0], self.tokens)

    def scores(self, model: MixerModel) -> tuple[Tensor, Tensor]:
        """Compute `model.losses` at the positions: loss and correctness of each prediction."""
        return model.losses(self.attend(model)[0], self.tokens, self.targets)

    def to(self, device: torch.device) -> Self:
        tokens, targets, rows = (ids.to(device) for ids in (self.tokens, self.targets, self.rows))
        return type(self)(tokens, targets, rows, self.spans)
