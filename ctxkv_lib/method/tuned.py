"""The parts of recipe `tuned`: a block that encodes running means, and a layer with unevenly spaced slots.

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

MEANS, SHORTEST_MEAN = 3, 4.0  # number of running means, and length of the shortest mean in tokens
MEAN_STD = 0.6  # standard deviation of units for means, relative to units for the current token
LINEAR = 6.0  # bias that makes GELU nearly linear: for z > 6, GELU(z) equals z to within 1e-8
STEADY = 100.0  # squared value of the constant unit, relative to the sum of squares of all other units

LARGEST_NEAR_SLOT = 4.0  # the heads initially prefer slots from 1 to 4, spread evenly on a log scale
SLOT_BIAS = 4.0  # initial bias of a head's preferred slot; gives it 64% of the attention if all scores are 0
BIASED_SLOTS = 32  # with more or fewer slots than this, the initial bias differs from `SLOT_BIAS`


class StructuredBlock(ContextBlock):
    """A ContextBlock that is initialized to encode the current token and running means of tokens."""

    @dataclass(frozen=True)
    class Settings:
        longest_mean: float = setting(
            40.0,
            "length of the longest running mean that the block is initialized to encode; the shortest is 4",
            at_least(SHORTEST_MEAN),
            "tokens",
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
        """Initialize the weights deterministically; takes the arguments of `Block.init_weights`.

        Half of the units encode the current token's largest principal components, each divided by the square
        root of its standard deviation. The other units encode the principal components of running means, all
        with equal variance. The lengths of the means run from `SHORTEST_MEAN` to `longest_mean` tokens,
        spread evenly on a log scale. The last unit is constant.
        """
        mean, axes, deviations = principal_components(embeddings, tokens)
        averaged = self.context_dim // (2 * MEANS)  # units per mean
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
        """Initialize the weights so that a step is almost linear: `c' = carried @ c + weights @ (x - mean)`.

        GELU(z) is nearly z for large z, so all units get the same large bias; the norm subtracts this bias
        as part of the mean. The last unit is constant and larger than all others together, so the norm always
        divides by nearly the same number. The norm multiplies the last unit by 0, so the last component of a
        context is 0. `variance` is the mean variance of a context's components. `carried` is
        `[context_dim - 1, context_dim - 1]`, and `weights` is `[context_dim - 1, hidden_size]`.
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
    """Compute the mean, the principal axes and the standard deviations of a stream's token embeddings.

    Takes the arguments of `Block.init_weights`. All results are float32 on the CPU. The axes are rows of a
    `[hidden_size, hidden_size]` tensor, sorted by decreasing variance; the largest component of each axis is
    positive. Standard deviations are at least a thousandth of the largest, and at least 1e-6, so none is 0.
    """
    shares = torch.bincount(tokens.cpu(), minlength=len(embeddings)).float() / len(tokens)
    rows = embeddings.float().cpu()
    mean = shares @ rows
    centered = (rows - mean) * shares[:, None].sqrt()
    variances, axes = torch.linalg.eigh((centered.T @ centered).double())
    deviations, axes = variances.flip(0).clamp(min=0).sqrt(), axes.T.flip(0)
    deviations = deviations.clamp(min=max(1e-3 * deviations[0].item(), 1e-6))
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return mean, (axes * largest.sign()).float(), deviations.float()


def geometric_offsets(config: ModelConfig) -> list[int]:
    """Return how many tokens back each of `max_contexts` slots lies, nearest first.

    The distances are 0, 1, and then grow by a constant factor (by at least 1 each time) up to
    `interval * (max_contexts - 1)`, the reach of evenly spaced slots.
    """
    count, reach = config.max_contexts, config.interval * (config.max_contexts - 1)
    if count < 3:
        return [config.interval * slot for slot in range(count)]
    return [0, *(max(slot, round(reach ** ((slot - 1) / (count - 2)))) for slot in range(1, count))]


class BiasedAttention(ContextKVAttention):
    """Attention to contexts with a learned bias for each slot's score; keys have no bias.

    Each head is initialized to prefer one of the slots 1 to 4; more heads prefer near slots than far slots.
    The initial share of attention for the preferred slot does not depend on the number of slots.
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
    """Attention and feed-forward, without a residual connection from the embeddings to the output head."""

    @dataclass(frozen=True)
    class Settings:
        current_token_bias: float = setting(-5.0, "added to the current token's logit; tokens rarely repeat")
        input_dropout: float = setting(
            0.2, "dropout on the token embeddings that the layer reads", SHARE, "share"
        )
        layer_dropout: float = setting(
            0.1, "dropout after attention, and inside and after feed-forward", SHARE, "share"
        )
        copy_weight: float = setting(
            0.1,
            "total probability of copied tokens, i.e. tokens that followed similar contexts; 0 in training",
            Allowed("0 or more, less than 1", lambda value: 0 <= value < 1),
        )
        copy_sharpness: float = setting(
            8.0, "how strongly copying prefers similar contexts (factor for the cosine similarity)", WEIGHT
        )

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
