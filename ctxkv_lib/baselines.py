"""Baselines to compare an idea with: four layers, a block, and two losses for Phase 1.

`CurrentToken`, `LastTokens`, `GRU` and `LSTM` are layers, which read tokens instead of contexts. `GatedBlock`
is a block. `Recall` and `NextEmbedding` are losses::

    ctxkv.run(config, layer=ctxkv.baselines.GRU)
    ctxkv run --layer ctxkv_lib.baselines:LastTokens --set layer.history=64

The layers have as many weights as the layers of the recipes, within 0.1%. Their defaults are those of recipe
`tuned`, with which they reach their best results (docs/study.md). Imports are absolute, so that an exported
model can carry this file.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxkv_lib.method.block import Block
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.fields import POSITIVE, SHARE, at_least, check_settings, setting
from ctxkv_lib.method.layer import FeedForward, Layer
from ctxkv_lib.method.tuned import BiasedAttention

RECALLED = 4  # how many of the last tokens the loss `Recall` reconstructs


class TokenLayer(Layer):
    """The base class of the layers. Subclasses define `add_layers`, which sets `norm`, and `mix`.

    Let x be the embedding of a token and m the output of `mix`. As in recipe `tuned`, the output head reads
    m + feed_forward(norm(x + m)). The width of the feed-forward layer is chosen so that the layer has as many
    weights as the layer of recipe `tuned`.
    """

    reads = "tokens"
    norm: nn.Module

    @dataclass(frozen=True)
    class Settings:
        current_token_bias: float = setting(-5.0, "is added to the logit of the current token")
        input_dropout: float = setting(0.2, "dropout of the embeddings", SHARE)
        layer_dropout: float = setting(0.1, "dropout after each part of the layer", SHARE)

        def __post_init__(self) -> None:
            check_settings(self, "layer")

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        super().__init__()
        self.settings: Any = settings
        self.current_token_bias = settings.current_token_bias
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.layer_dropout = nn.Dropout(settings.layer_dropout)
        self.add_layers(config)
        spare = (attention_size(config) - size_of(self)) / (2 * config.hidden_size + 1)
        width = max(1, config.intermediate_size + round(spare))
        self.feed_forward = FeedForward(config.hidden_size, width, settings.layer_dropout)

    def add_layers(self, config: ModelConfig) -> None:
        raise NotImplementedError

    def mix(self, embeddings: Tensor, start: int) -> Tensor:
        """Map embeddings `[rows, length, hidden_size]` to `[rows, length - start, hidden_size]`."""
        raise NotImplementedError

    def forward(self, embeddings: Tensor, start: int) -> Tensor:
        embeddings = self.input_dropout(embeddings)
        added = self.layer_dropout(self.mix(embeddings, start))
        hidden: Tensor = added + self.feed_forward(self.norm(embeddings[:, start:] + added))
        return hidden


def size_of(module: nn.Module) -> int:
    """Return the number of weights of a module."""
    return sum(weight.numel() for weight in module.parameters())


def attention_size(config: ModelConfig) -> int:
    """Return the number of weights of attention to contexts in recipe `tuned`."""
    with torch.device("meta"):
        return size_of(BiasedAttention(config))


class CurrentToken(TokenLayer):
    """A layer that reads only the current token. It shows what a model reaches without any context."""

    def add_layers(self, config: ModelConfig) -> None:
        self.norm = nn.Identity()

    def mix(self, embeddings: Tensor, start: int) -> Tensor:
        return torch.zeros_like(embeddings[:, start:])


class LastTokens(TokenLayer):
    """Attention as in GPT-2 to the last `history` tokens, with a learned bias for each distance."""

    @dataclass(frozen=True)
    class Settings(TokenLayer.Settings):
        history: int = setting(
            32, "how many tokens attention reads, with the current one", at_least(1), "tokens"
        )

    def add_layers(self, config: ModelConfig) -> None:
        h, self.num_heads, self.window = config.hidden_size, config.num_heads, self.settings.history
        self.q, self.v, self.out = (nn.Linear(h, h) for _ in range(3))
        # A bias of the keys would cancel in the softmax.
        self.k = nn.Linear(h, h, bias=False)
        # Creating the bias draws random numbers. The fork keeps this from changing the weights drawn later.
        with torch.random.fork_rng(devices=[]):
            self.bias = BiasedAttention(replace(config, max_contexts=self.window)).slot_bias
        self.dropout, self.norm, self.history = config.attention_dropout, nn.LayerNorm(h), self.window - 1

    def mix(self, embeddings: Tensor, start: int) -> Tensor:
        query, key, value = (
            layer(part)
            .unflatten(2, (self.num_heads, -1))
            .transpose(1, 2)  # (rows, heads, positions, head_dim)
            for layer, part in ((self.q, embeddings[:, start:]), (self.k, embeddings), (self.v, embeddings))
        )
        column = torch.arange(embeddings.shape[1], device=embeddings.device)
        distance = column[start:, None] - column
        unseen = (distance < 0) | (distance >= self.window)
        bias = self.bias[:, distance.clamp(0, self.window - 1)].masked_fill(unseen, -torch.inf)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))


class RecurrentLayer(TokenLayer):
    """A layer that mixes tokens with a recurrent network, which reads each row from its first token.

    Attributes:
        kind: the class of the network. gates: its number of gates.
    """

    kind: Any
    gates: int

    @dataclass(frozen=True)
    class Settings(TokenLayer.Settings):
        burn_in: int = setting(
            128, "in training, how many tokens are read before outputs count", POSITIVE, "tokens"
        )

    def add_layers(self, config: ModelConfig) -> None:
        h, gates = config.hidden_size, self.gates
        # There are gates · units² + linear · units + 3 h weights. `units` is the largest number that fits.
        linear, spare = (gates + 1) * h + 2 * gates, attention_size(config) - 3 * h
        units = max(1, (math.isqrt(linear**2 + 4 * gates * spare) - linear) // (2 * gates))
        self.network, self.out = self.kind(h, units, batch_first=True), nn.Linear(units, h)
        self.dropout, self.norm = nn.Dropout(config.attention_dropout), nn.LayerNorm(h)
        self.history, self.evaluation_history = self.settings.burn_in, config.context_window

    def mix(self, embeddings: Tensor, start: int) -> Tensor:
        # Autocast is off because it would make cuDNN use fp16.
        with torch.autocast(embeddings.device.type, enabled=False):
            states, _ = self.network(embeddings.to(self.out.weight.dtype))
        return self.out(self.dropout(states[:, start:]))


class GRU(RecurrentLayer):
    """A gated recurrent unit (Cho et al., 2014)."""

    kind, gates = nn.GRU, 3


class LSTM(RecurrentLayer):
    """Long short-term memory (Hochreiter & Schmidhuber, 1997)."""

    kind, gates = nn.LSTM, 4


class GatedBlock(Block):
    """A GRU cell as a ContextBlock (Cho et al., 2014)."""

    def __init__(self, context_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.read = nn.Linear(hidden_size, 3 * context_dim)
        self.carry = nn.Linear(context_dim, 3 * context_dim)

    def project_inputs(self, embeddings: Tensor) -> Tensor:
        return self.read(embeddings)

    def forward(self, contexts: Tensor, inputs: Tensor) -> Tensor:
        reset, update, new = inputs.chunk(3, dim=-1)
        reset_before, update_before, new_before = self.carry(contexts).chunk(3, dim=-1)
        candidate = (new + (reset + reset_before).sigmoid() * new_before).tanh()
        return torch.lerp(candidate, contexts, (update + update_before).sigmoid())


class Recall(nn.Module):
    """A loss for Phase 1: linear maps of a context reconstruct the embeddings of the last four tokens."""

    def __init__(self, context_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.read = nn.ModuleList(nn.Linear(context_dim, hidden_size) for _ in range(RECALLED))

    def forward(self, contexts: Tensor, embeddings: Tensor) -> Tensor:
        errors = [read(contexts) - embeddings.roll(back, dims=0) for back, read in enumerate(self.read)]
        squares = torch.stack([error[back:].square().sum() for back, error in enumerate(errors)])
        return squares.sum() / embeddings.numel()


class NextEmbedding(nn.Module):
    """A loss for Phase 1: a linear map of a context predicts the embedding of the next token."""

    def __init__(self, context_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.guess = nn.Linear(context_dim, hidden_size)

    def forward(self, contexts: Tensor, next_embeddings: Tensor) -> Tensor:
        return (self.guess(contexts) - next_embeddings).square().mean()
