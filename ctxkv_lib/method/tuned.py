"""The parts of recipe `tuned`: a block that encodes running means, and a layer with slots of its own.

Every saved model includes this file, so it imports only torch and files that are saved with it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import ContextBlock
from .config import ModelConfig, Phase1Config
from .copying import Copying
from .fields import SHARE, WEIGHT, Allowed, at_least, check_settings, require, setting
from .layer import ContextKVAttention, FeedForward, Layer

MEANS, SHORTEST_MEAN = 3, 4.0  # running means: how many, and over how many tokens the shortest
MEAN_STD = 0.6  # standard deviation of their units, where that of the current token's units is 1
LINEAR = 6.0  # from here on GELU(z) is z, to 1e-8
STEADY = 100.0  # square of a step's constant unit, over the sum of all others'

LARGEST_NEAR_SLOT = 4.0  # the heads prefer slots 1 to this one, evenly on a log scale
SLOT_BIAS = 4.0  # where scores are 0, a slot of 32 with this bias gets 64% of a head's attention
BIASED_SLOTS = 32


class StructuredBlock(ContextBlock):
    """A ContextBlock that is initialised to encode the current token and running means of tokens."""

    @dataclass(frozen=True)
    class Settings:
        longest_mean: float = setting(
            40.0, "initialised to encode running means of 4 to so many", at_least(SHORTEST_MEAN), "tokens"
        )

        def __post_init__(self) -> None:
            check_settings(self, "block")

    def __init__(self, context_dim: int, hidden_size: int, settings: Settings) -> None:
        super().__init__(context_dim, hidden_size)
        self.settings = settings
        allowed = f"at most model.hidden_size ({hidden_size}) with a StructuredBlock"
        require(context_dim <= hidden_size, "model.context_dim", context_dim, allowed)

    @torch.no_grad()
    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Phase1Config) -> None:
        """Initialise the weights, without any random number; arguments as for `Block.init_weights`.

        Half of the units hold the token's largest principal components, each scaled half-way to equal
        variance. The others hold those of means over `SHORTEST_MEAN` to `longest_mean` tokens, evenly on a
        log scale, all of equal variance. One unit is left over.
        """
        mean, axes, deviations = principal_components(embeddings, tokens)
        averaged = self.context_dim // (2 * MEANS)  # units of one mean
        whole = self.context_dim - 1 - MEANS * averaged
        halfway = deviations[:whole].sqrt()
        token = axes[:whole] / (halfway * halfway.square().mean().sqrt())[:, None]
        equal = axes[:averaged] / deviations[:averaged, None]
        longest = math.log10(self.settings.longest_mean)
        decay = 1 - 1 / torch.logspace(math.log10(SHORTEST_MEAN), longest, MEANS)
        means = [equal * scale for scale in MEAN_STD * (1 - decay**2).sqrt()]
        carried = torch.diag(torch.cat([torch.zeros(whole), decay.repeat_interleave(averaged)]))
        variance = (whole + MEANS * averaged * MEAN_STD**2) / self.context_dim
        self.init_linear_recurrence(mean, carried, torch.cat([token, *means]), variance)

    def init_linear_recurrence(self, mean: Tensor, carried: Tensor, weights: Tensor, variance: float) -> None:
        """Initialise the weights so that a step is all but linear: `c' = carried @ c + weights @ (x - mean)`.

        GELU(z) is z where z is large, so all units get one large bias, which the norm subtracts with their
        mean. The norm divides by a constant, since the last unit is constant and larger than all others
        together; its scale is 0, so contexts, whose mean variance is given, are 0 there. `carried` is square,
        of one row less than a context has units, as `weights` `[context_dim - 1, hidden_size]`.
        """
        size = self.context_dim
        steady = math.sqrt(STEADY * variance * size)
        self.linear.weight[:, :size] = F.pad(carried, (0, 1, 0, 1)) - torch.eye(size)
        self.linear.weight[:, size:] = F.pad(weights, (0, 0, 0, 1))
        self.linear.bias.copy_(LINEAR - F.pad(weights @ mean, (0, 1), value=-steady))
        self.norm.weight.fill_(math.sqrt(variance + steady**2 / size * (1 - 1 / size)))
        self.norm.bias.fill_(steady / size)
        self.norm.weight[-1] = self.norm.bias[-1] = 0


def principal_components(embeddings: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean, principal axes and standard deviations of a stream; arguments as of `init_weights`.

    All are float32 on the CPU. The axes are rows, `[hidden_size, hidden_size]`, that of the largest variance
    first, each with a positive largest component. Where tokens do not vary, a deviation is not 0 but a
    thousandth of the largest, at least 1e-6.
    """
    shares = torch.bincount(tokens.cpu(), minlength=len(embeddings)).float() / len(tokens)
    rows = embeddings.float().cpu()
    mean = shares @ rows
    centred = (rows - mean) * shares[:, None].sqrt()
    variances, axes = torch.linalg.eigh((centred.T @ centred).double())
    deviations, axes = variances.flip(0).clamp(min=0).sqrt(), axes.T.flip(0)
    deviations = deviations.clamp(min=max(1e-3 * deviations[0].item(), 1e-6))
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return mean, (axes * largest.sign()).float(), deviations.float()


def geometric_offsets(config: ModelConfig) -> list[int]:
    """Return the distances of `max_contexts` geometric slots in tokens, nearest first.

    They are 0, 1, and then grow by a constant factor (by at least 1 each time) up to the reach of uniform
    slots.
    """
    count, reach = config.max_contexts, config.interval * (config.max_contexts - 1)
    if count < 3:
        return [config.interval * slot for slot in range(count)]
    return [0, *(max(slot, round(reach ** ((slot - 1) / (count - 2)))) for slot in range(1, count))]


class BiasedAttention(ContextKVAttention):
    """Attention to contexts with a learned bias of each slot's score; keys need none of their own.

    Heads first prefer slots 1 to 4, more of them the nearer ones. A preferred slot begins with the same share
    of its head's attention, however many slots there are.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, key_bias=False)
        slots = config.max_contexts
        preferred = SLOT_BIAS + math.log(max(1, slots - 1) / (BIASED_SLOTS - 1))
        nearest = torch.logspace(0, 1, config.num_heads, base=LARGEST_NEAR_SLOT).round().long()
        biases = torch.zeros(config.num_heads, slots)
        self.slot_bias = nn.Parameter(biases.scatter_(1, nearest.clamp(max=slots - 1)[:, None], preferred))

    def attention_weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return super().attention_weights(scores + self.slot_bias, mask)


class SlotLayer(Layer):
    """Attention to geometric slots, and feed-forward; the output head reads no residual of the embedding."""

    @dataclass(frozen=True)
    class Settings:
        current_token_bias: float = setting(-5.0, "added to the current token's logit: repeats are rare")
        input_dropout: float = setting(0.2, "on the token embeddings that are read", SHARE, "share")
        layer_dropout: float = setting(0.1, "after attention, in and after feed-forward", SHARE, "share")
        copy_weight: float = setting(
            0.1,
            "of the probability, outside of training, for tokens that followed similar contexts",
            Allowed("0 or more, less than 1", lambda value: 0 <= value < 1),
        )
        copy_sharpness: float = setting(8.0, "how similar: the factor of the cosine of contexts", WEIGHT)

        def __post_init__(self) -> None:
            check_settings(self, "layer")

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        super().__init__()
        self.settings, self.is_masked = settings, config.kv_method == "variable"
        self.current_token_bias, weight = settings.current_token_bias, settings.copy_weight
        self.copying = Copying(weight, settings.copy_sharpness) if weight else None
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.layer_dropout = nn.Dropout(settings.layer_dropout)
        self.attention = BiasedAttention(config)
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size, settings.layer_dropout)

    def slot_offsets(self, config: ModelConfig) -> list[int]:
        return geometric_offsets(config)

    def forward(self, embeddings: Tensor, window: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.input_dropout(embeddings)
        attended, weights = self.attention.attend(embeddings, window, present if self.is_masked else None)
        attended = self.layer_dropout(attended)
        hidden = self.attention.norm(embeddings + attended)
        return attended + self.feed_forward(hidden), weights
