"""Gather a layer's inputs at positions of a stream: contexts in slots, or preceding tokens.

Contexts of a stream are padded with one zero row in front: `[num_tokens + 1, context_dim]`. Row i + 1 is the
context of position i. Slots before the start of the stream read row 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .streams import Batch, Stream, rows_of

LONGEST_ROW = 256  # maximum number of positions in a batch that share one row of tokens


class ContextWindow:
    """The slots whose contexts a position sees; slot 0 is the position itself.

    Attributes:
        offsets: how many tokens back each slot lies, ascending from 0.
        chunk: how many consecutive positions an epoch visits together.
    """

    def __init__(self, offsets: Sequence[int], chunk: int = 1) -> None:
        self.offsets, self.chunk = list(offsets), chunk
        self._on_device: dict[torch.device, Tensor] = {}

    def slots(self, positions: Tensor) -> Tensor:
        """Return the positions of all slots for each position in `positions`, int64 `[...]`.

        The result is int64 `[..., slots]`, nearest slot first, and negative for slots before the stream.
        """
        device = positions.device
        offsets = self._on_device.get(device)  # cached to avoid GPU waits
        # A tensor that was cached while the model was on the meta device may be on the wrong device.
        if offsets is None or offsets.device != device:
            offsets = torch.tensor(self.offsets, device=device)
            if type(offsets) is Tensor:  # not a fake tensor of `torch.export`
                self._on_device[device] = offsets
        return positions[..., None] - offsets

    def rows(self, positions: Tensor) -> Tensor:
        """Return the row of each slot in the padded contexts; slots before the stream get row 0."""
        return (self.slots(positions) + 1).clamp(min=0)

    def gather(self, stream: Stream, positions: Tensor, training: bool) -> Batch:
        """Gather the layer's inputs at `positions`, int64 `[n]` on any device; `training` has no effect."""
        assert stream.contexts is not None
        rows = self.rows(positions)
        inputs = rows_of(stream.contexts, rows), rows > 0
        embeddings = None if stream.embeddings is None else rows_of(stream.embeddings, positions)
        return Batch(*_tokens(stream, positions), inputs, embeddings)


class TokenWindow:
    """The tokens before a position, in rows of consecutive tokens.

    Attributes:
        offsets: None, since there are no slots.
        chunk: how many consecutive positions an epoch visits together.
        history: how many tokens before a position are read in training.
        evaluation_history: the same in evaluation.
    """

    offsets = None

    def __init__(self, history: int, evaluation_history: int | None, chunk: int) -> None:
        self.history, self.chunk = history, chunk
        self.evaluation_history = history if evaluation_history is None else evaluation_history

    def gather(self, stream: Stream, positions: Tensor, training: bool) -> Batch:
        """Gather one row of tokens, with history, per run of consecutive `positions`; split long runs."""
        breaks = (positions.diff() != 1).nonzero().flatten() + 1
        runs = positions.cpu().tensor_split(breaks.cpu())
        spans, rows = [], []  # span: the first requested column, and the column after the last
        for part in (part for run in runs for part in run.split(LONGEST_ROW)):
            start, stop = int(part[0]), int(part[-1]) + 1
            first = max(0, start - (self.history if training else self.evaluation_history))
            spans.append((start - first, stop - first))
            rows.append(stream.ids[first:stop])
        padded, start = pad_sequence(rows, batch_first=True), min(first for first, _ in spans)
        width = padded.shape[1] - start
        places = [row * width + column - start for row, span in enumerate(spans) for column in range(*span)]
        return Batch(*_tokens(stream, positions), (start,), rows=padded, places=torch.tensor(places))


def _tokens(stream: Stream, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the current tokens, int32 `[n]`, and the next tokens, int64 `[n]`."""
    return rows_of(stream.ids, positions), rows_of(stream.ids, positions + 1).long()
