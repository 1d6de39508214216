"""What a baseline has in the place of contexts and the attention to them.

All but `TokenBlock` read rows of consecutive tokens and answer at a span of each. With x the normed embedding
of a position and m what is remembered there, they give `LayerNorm(x + m)` and m, as attention does.
"""

import torch
from torch import Tensor, nn

from ..method.config import ModelConfig
from ..method.model import first_biases


class TokenBlock(nn.Module):
    """In the place of the ContextBlock: the context of a position is the token's own normed embedding."""

    def project_tokens(self, embeddings: Tensor) -> Tensor:
        return embeddings

    def forward(self, contexts: Tensor, token_half: Tensor) -> Tensor:
        """The next contexts, `[n, hidden_size]`, whatever the previous ones are."""
        return token_half


def own_rows(rows: Tensor, spans: Tensor) -> Tensor:
    """Of each row `[T, ...]` what lies in its span, one after the other: `[n, ...]`.

    Args:
        rows: `[r, T, ...]`.
        spans: int64 `[r, 2]`, first and one past the last column.
    """
    return torch.cat([row[start:stop] for row, (start, stop) in zip(rows, spans.tolist(), strict=True)])


class NoMemory(nn.Module):
    """Nothing is remembered: the embeddings as they are."""

    def forward(self, embeddings: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
        """`[r, T, hidden_size]` to two of `[n, hidden_size]`, the second of zeros."""
        own = own_rows(embeddings, spans)
        return own, torch.zeros_like(own)


class CausalAttention(nn.Module):
    """Attention of a GPT-2 block to each of the last `context_window` tokens, its own among them.

    Order is in a learned bias by head and distance, which lets a token's key be the same wherever it is read
    from; GPT-2 adds a vector by position, counted from the start of its window. It begins as
    `model.slot_bias` says, with a distance for a slot.
    """

    def __init__(self, shapes: ModelConfig) -> None:
        super().__init__()
        h, self.num_heads, self.window = shapes.hidden_size, shapes.num_heads, shapes.context_window
        self.q, self.v, self.out = (nn.Linear(h, h) for _ in range(3))
        self.k = nn.Linear(h, h, bias=False)  # which would add the same to all scores
        self.bias = nn.Parameter(first_biases(shapes.slot_bias, self.num_heads, self.window))
        self.dropout = nn.Dropout(shapes.attention_dropout)
        self.out_dropout = nn.Dropout(shapes.layer_dropout)
        self.norm = nn.LayerNorm(h)

    def forward(self, embeddings: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
        """`[r, T, hidden_size]` to hidden and what attention added to it, both `[n, hidden_size]`."""
        values = [
            self._attend(row[:stop], start)
            for row, (start, stop) in zip(embeddings, spans.tolist(), strict=True)
        ]
        attended = self.out_dropout(self.out(torch.cat(values)))
        return self.norm(own_rows(embeddings, spans) + attended), attended

    def _attend(self, row: Tensor, start: int) -> Tensor:
        """From `start` on, of one row `[T, hidden_size]`: `[T - start, hidden_size]`."""
        query, key, value = (
            layer(part).unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # (heads, positions, head_dim)
            for layer, part in ((self.q, row[start:]), (self.k, row), (self.v, row))
        )
        place = torch.arange(len(row), device=row.device)
        distance = place[start:, None] - place
        seen = (distance >= 0) & (distance < self.window)
        scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
        scores = scores + self.bias[:, distance.clamp(0, self.window - 1)]
        weights = self.dropout(scores.masked_fill(~seen, -torch.inf).softmax(dim=-1))
        return (weights @ value).transpose(0, 1).flatten(1)


class GatedRecurrence(nn.Module):
    """The state of a GRU that reads each row from its beginning."""

    def __init__(self, shapes: ModelConfig) -> None:
        super().__init__()
        self.gru = nn.GRU(shapes.hidden_size, shapes.gru_units, batch_first=True)
        self.dropout = nn.Dropout(shapes.attention_dropout)
        self.out = nn.Linear(shapes.gru_units, shapes.hidden_size)
        self.out_dropout = nn.Dropout(shapes.layer_dropout)
        self.norm = nn.LayerNorm(shapes.hidden_size)

    def forward(self, embeddings: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
        """As `CausalAttention`."""
        states = own_rows(self.gru(embeddings)[0], spans)
        added = self.out_dropout(self.out(self.dropout(states)))
        return self.norm(own_rows(embeddings, spans) + added), added
