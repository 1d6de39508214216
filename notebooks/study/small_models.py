"""A small GPT and a small LSTM of the usual kind. Their token table is also the output head."""

import math
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxkv_lib.baselines import size_of
from ctxkv_lib.method.losses import frozen_head_cross_entropy

# The number of weights without token table and output bias. Phase 2 of recipe `exact` trains as many.
WEIGHTS = 6_301_440
CHUNK = 2048  # vocabulary entries per chunk


class GPT(nn.Module):
    """Pre-norm transformer with learned positions. Linear layers map from and to the embeddings' size."""

    training_length = evaluation_length = 128  # tokens per window

    def __init__(self, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        width = {1: 640, 3: 384}[layers]
        self.read, self.write = nn.Linear(size, width), nn.Linear(width, size)
        self.positions = nn.Parameter(0.02 * torch.randn(self.training_length, width))
        spare = (WEIGHTS - size_of(self) - 2 * width) // layers - 4 * width * (width + 1) - 5 * width
        inner = spare // (2 * width + 1)  # width of the feed-forward layers
        options: Any = {"activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(width, width // 64, inner, dropout, **options)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor, state: None = None) -> tuple[Tensor, None]:
        length = inputs.shape[1]
        hidden = self.dropout(self.read(inputs) + self.positions[:length])
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.write(self.layers(hidden, mask, is_causal=True)), None


class LSTM(nn.Module):
    """One-layer LSTM with dropout before and after it. A linear layer maps to the embeddings' size."""

    # In training, each step starts from the state at the end of the previous step.
    training_length, evaluation_length = 64, 1280

    def __init__(self, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        # Without the output layer's bias, the model has 4 units² + linear · units weights.
        linear = 5 * size + 8
        units = (math.isqrt(linear**2 + 16 * WEIGHTS) - linear) // 8
        self.lstm, self.write = nn.LSTM(size, units, batch_first=True), nn.Linear(units, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        with torch.autocast("cpu", enabled=False):
            hidden, state = self.lstm(self.dropout(inputs.float()), state)
        return self.write(self.dropout(hidden)), tuple(part.detach() for part in state)


class LanguageModel(nn.Module):
    """A GPT or LSTM with an output bias, and a token table that is also the output head.

    Only tokens whose count in `counts` (int64 `[vocab_size]`) is positive are trained, and in training the
    softmax covers only these tokens. This halves the training time. The table rows and biases of all other
    tokens stay unchanged.
    """

    def __init__(self, body: nn.Module, table: Tensor, bias: Tensor, counts: Tensor) -> None:
        super().__init__()
        self.known = counts.nonzero().flatten()
        # The index of each known token in the list of known tokens.
        self.place = (counts > 0).cumsum(0) - 1
        self.body, self.whole_table, self.whole_bias = body, table.clone(), bias.clone()
        self.table, self.bias = nn.Parameter(table[self.known]), nn.Parameter(bias[self.known])

    @cached_property
    def frozen_head(self) -> Tensor:
        return self.table.detach().bfloat16()

    def forward(self, embeddings: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Compute hidden states from token embeddings. Both have the shape `[rows, length, hidden_size]`."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden, state = self.body(F.layer_norm(embeddings, embeddings.shape[-1:]), state)
        return hidden.float(), state

    def set_gradients(self, tokens: Tensor, state: Any) -> Any:
        """Set the gradients of the mean loss over tokens `[rows, length + 1]`. Return the next state.

        Autograd would take twice as long. This method computes all products with the table in bfloat16, and
        reads the vocabulary in chunks that fit into the processor's cache.
        """
        tokens, table, bias = self.place[tokens], self.table.detach(), self.bias.detach()
        targets, embeddings = tokens[:, 1:].flatten(), F.embedding(tokens[:, :-1], table).requires_grad_()
        hidden, state = self(embeddings, state)
        queries = hidden.detach().flatten(0, 1)
        bias = bias - ((queries * table[targets]).sum(dim=1) + bias[targets]).mean()  # keeps `exp` in range
        head = table.bfloat16() if self.table.requires_grad else self.frozen_head
        shares, total, average = [], 0.0, 0.0
        for rows, bias_of_rows in zip(head.split(CHUNK), bias.bfloat16().split(CHUNK), strict=True):
            shares.append(F.linear(queries.bfloat16(), rows, bias_of_rows).exp_())
            total = total + shares[-1].sum(dim=1, keepdim=True, dtype=torch.float32)
            average = average + (shares[-1] @ rows).float()
        scale = 1 / (len(targets) * total)
        hidden.backward((average * scale - table[targets] / len(targets)).view_as(hidden))
        self.bias.grad = torch.cat([(scale.T.bfloat16() @ part).float()[0] for part in shares])
        self.bias.grad.index_add_(0, targets, torch.full_like(total[:, 0], -1 / len(targets)))
        if self.table.requires_grad:
            scaled = (queries * scale).bfloat16()
            self.table.grad = torch.cat([(part.T @ scaled).float() for part in shares])
            self.table.grad.index_add_(0, targets, queries, alpha=-1 / len(targets))
            self.table.grad.index_add_(0, tokens[:, :-1].flatten(), embeddings.grad.flatten(0, 1))
        return state

    @torch.no_grad()
    def token_losses(self, ids: Tensor) -> Tensor:
        """Compute the losses `[n - 1]` in nats of all tokens in a stream `[n]` except the first token.

        The softmax covers the whole vocabulary. Windows overlap by half. All losses in the first window are
        used; in later windows, only the losses in the second half are used.
        """
        self.eval()
        self.whole_table[self.known], self.whole_bias[self.known] = self.table, self.bias
        half, count = self.body.evaluation_length // 2, len(ids) - 1
        padded = F.pad(ids[:-1], (0, max(2 * half - count, -count % half)))
        windows = F.embedding(padded, self.whole_table).unfold(0, 2 * half, half).transpose(1, 2)
        hidden = torch.cat([self(rows)[0] for rows in windows.split(32)])
        hidden = torch.cat([hidden[0, :half], hidden[:, half:].flatten(0, 1)])[:count]
        pairs, table = zip(hidden.split(512), ids[1:].split(512), strict=True), self.whole_table.bfloat16()
        parts = [frozen_head_cross_entropy(rows, table, targets, self.whole_bias) for rows, targets in pairs]
        return torch.cat([losses for losses, _ in parts])
