"""Baselines for contexts: mixers with the same number of trained weights, and a block without recurrence.

`runs.rows` describes the interface of mixers. With x the normed embedding of a position and m the output of
a mixer, the hidden state is `LayerNorm(x + m)` and feed-forward, as with contexts.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method.config import ModelConfig, Phase1Config
from ..method.model import ContextKV, FeedForward, Parts
from ..method.settings import require, setting
from ..method.windows import Window
from .tuned import SLOT_BIASES, LayerSettings, ResidualLayer, SlotAttention, StructuredBlock, initial_biases

GRADIENT_TOKENS = 32  # tokens through which the gradient of an end-to-end ContextBlock goes back at most
TRAINED_BURN_IN = 128  # tokens that a recurrence reads, in training, before those that matter


class TokenBlock(nn.Module):
    """A block without weights: the context of a position is the token's own normed embedding."""

    def __init__(self, context_dim: int, hidden_size: int) -> None:
        super().__init__()
        allowed = f"model.hidden_size ({hidden_size}) with this block"
        require(context_dim == hidden_size, "model.context_dim", context_dim, allowed)

    def forward(self, contexts: Tensor, inputs: Tensor) -> Tensor:
        """Return the inputs, `[n, hidden_size]`, whatever the previous contexts are."""
        return inputs


class Mixer(ResidualLayer):
    """Base of mixers: a subclass adds its layers, `norm` among them, and computes m.

    `mix(embeddings, start)` takes `[rows, length, hidden_size]` and returns m for all columns from `start`.
    """

    history = 0
    norm: nn.Module
    add_layers: Callable[[ModelConfig, Any], None]
    mix: Callable[[Tensor, int], Tensor]

    @dataclass(frozen=True)
    class Settings(LayerSettings):
        concern: ClassVar[str] = "mixer"

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        super().__init__(settings)
        self.add_layers(config, settings)
        width = feed_forward_width(config, attention_weights(config) - number_of_weights(self))
        self.feed_forward = FeedForward(config.hidden_size, width, settings.layer_dropout)

    def forward(self, embeddings: Tensor, start: int) -> Tensor:
        """Compute hidden states, of the shapes of `mix`."""
        embeddings = self.input_dropout(embeddings)
        return self.output(embeddings[:, start:], self.mix(embeddings, start), self.norm)


class NoContext(Mixer):
    """A model of the current token only, whose embedding is normed already."""

    def add_layers(self, config: ModelConfig, settings: Mixer.Settings) -> None:
        self.norm = nn.Identity()

    def mix(self, embeddings: Tensor, start: int) -> Tensor:
        return torch.zeros_like(embeddings[:, start:])


class CausalAttention(Mixer):
    """Attention of a GPT-2 block to each of the last `context_window` tokens, the current one among them.

    A learned bias by head and distance encodes order, where GPT-2 adds a vector by position.
    """

    @dataclass(frozen=True)
    class Settings(Mixer.Settings):
        slot_bias: str = setting(
            "learned", "what is added to a token's score, by head and distance", SLOT_BIASES
        )

    def add_layers(self, config: ModelConfig, settings: Settings) -> None:
        h, self.num_heads, self.window = config.hidden_size, config.num_heads, config.context_window
        self.q, self.v, self.out = (nn.Linear(h, h) for _ in range(3))
        self.k = nn.Linear(h, h, bias=False)  # softmax would drop it
        self.bias = nn.Parameter(initial_biases(settings.slot_bias, self.num_heads, self.window))
        self.dropout = config.attention_dropout
        self.norm = nn.LayerNorm(h)
        self.history = self.window - 1

    def mix(self, embeddings: Tensor, start: int) -> Tensor:
        query, key, value = (
            layer(part)
            .unflatten(2, (self.num_heads, -1))
            .transpose(1, 2)  # (rows, heads, positions, head_dim)
            for layer, part in ((self.q, embeddings[:, start:]), (self.k, embeddings), (self.v, embeddings))
        )
        column = torch.arange(embeddings.shape[1], device=embeddings.device)
        distance = column[start:, None] - column
        seen = (distance >= 0) & (distance < self.window)
        bias = self.bias[:, distance.clamp(0, self.window - 1)].masked_fill(~seen, -torch.inf)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))


class GRUMixer(Mixer):
    """The state of a GRU that reads each row from its beginning."""

    history = TRAINED_BURN_IN

    def add_layers(self, config: ModelConfig, settings: Mixer.Settings) -> None:
        h, most = config.hidden_size, attention_weights(config)

        def size(units: int) -> int:
            return 3 * (h + units + 2) * units + (units + 1) * h + 2 * h

        units = max(1, bisect_right(range(1, most), most, key=size))  # the most that fit
        self.gru = nn.GRU(h, units, batch_first=True)
        self.dropout = nn.Dropout(config.attention_dropout)
        self.out = nn.Linear(units, h)
        self.norm = nn.LayerNorm(h)
        self.evaluation_history = config.context_window

    def mix(self, embeddings: Tensor, start: int) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):  # under which cuDNN's is fp16, never bf16
            states, _ = self.gru(embeddings.to(next(self.gru.parameters()).dtype))
        return self.out(self.dropout(states[:, start:]))


class EndToEnd(nn.Module):
    """Contexts of a ContextBlock that Phase 2 trains through its recurrence, and attention to them."""

    @dataclass(frozen=True)
    class Settings(SlotAttention.Settings, StructuredBlock.Settings):
        concern: ClassVar[str] = "mixer"

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        """Make the layers; raises ValueError if settings and shapes do not go together."""
        super().__init__()
        require(config.anchor == "current", "model.anchor", config.anchor, "current with this mixer")
        require(not settings.copy_weight, "mixer.copy_weight", settings.copy_weight, "0 with this mixer")
        self.context_block = StructuredBlock(config.context_dim, config.hidden_size, settings)
        self.width = feed_forward_width(config, -number_of_weights(self.context_block))
        self.attention = SlotAttention(replace(config, intermediate_size=self.width), settings)
        self.current_token_bias, self.settings = settings.current_token_bias, settings
        self.window = Window(config, self.attention.slot_offsets(config))
        reach = self.window.offsets[-1]
        self.history, self.evaluation_history = reach + TRAINED_BURN_IN, reach + config.context_window

    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Phase1Config) -> None:
        """Initialise the block, and heads that depend on it; arguments as of `ContextBlock.init_weights`."""
        self.context_block.init_weights(embeddings, tokens, config)
        self.attention.init_from_block(self.context_block)

    def served(self, model: ContextKV) -> tuple[ContextKV, dict[str, Any]]:
        """Return a trained model in the form that attends to contexts, and its plug-ins."""
        parts = Parts(lambda *_: self.context_block, lambda _: self.attention)
        config = replace(model.config, intermediate_size=self.width)
        served = ContextKV(config, model.wte.num_embeddings, model.log_unigram is not None, parts)
        served.load_table(model.wte.weight)
        served.log_unigram = model.log_unigram
        kinds: dict[str, Any] = {"block": StructuredBlock, "attention": SlotAttention}
        return served, {
            hook: {
                "plugin": f"{kind.__module__}:{kind.__name__}",
                "settings": {f.name: getattr(self.settings, f.name) for f in fields(kind.Settings)},
            }
            for hook, kind in kinds.items()
        }

    def forward(self, embeddings: Tensor, start: int) -> Tensor:
        """Compute hidden states: `[rows, length, hidden_size]` to `[rows, length - start, hidden_size]`.

        A slot holds a context if its column is in the row. A row that does not begin where the stream does
        has all the history that its slots reach.
        """
        with torch.autocast(embeddings.device.type, enabled=False):  # else roundings of contexts add up
            contexts = self._contexts(embeddings.to(self.context_block.linear.weight.dtype))
        slots = self.window.slots(torch.arange(start, embeddings.shape[1], device=embeddings.device))
        present = slots >= 0  # (columns, slots)
        windows = contexts[:, slots.clamp(min=0)].where(present[..., None], 0)
        hidden, _ = self.attention(
            embeddings[:, start:].flatten(0, 1), windows.flatten(0, 1), present.repeat(len(windows), 1)
        )
        return hidden.unflatten(0, windows.shape[:2])

    def _contexts(self, embeddings: Tensor) -> Tensor:
        """Compute contexts `[rows, length, context_dim]` after each column."""
        inputs = self.context_block.project_inputs(embeddings)
        state, contexts = inputs.new_zeros(len(inputs), self.context_block.context_dim), []
        for column, token in enumerate(inputs.unbind(1)):
            state = self.context_block(state.detach() if column % GRADIENT_TOKENS == 0 else state, token)
            contexts.append(state)
        return torch.stack(contexts, dim=1)


def number_of_weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def attention_weights(config: ModelConfig) -> int:
    """Count the weights of attention to contexts with a slot bias."""
    with torch.device("meta"):
        layer = SlotAttention(config, SlotAttention.Settings(slot_bias="learned"))
    return number_of_weights(layer.attention)


def feed_forward_width(config: ModelConfig, spare: int) -> int:
    """Return the inner width of a feed-forward layer that has so many weights more than the published one."""
    return max(1, config.intermediate_size + round(spare / (2 * config.hidden_size + 1)))
