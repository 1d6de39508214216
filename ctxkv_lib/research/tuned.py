"""Plug-ins of recipes `tuned` and `look_up`: a ContextBlock with structured init, attention with slot biases.

A model folder includes this file, so it imports only torch and what every model folder has.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hf.copying import Copying
from ..method.config import ModelConfig, Phase1Config
from ..method.model import ContextBlock, ContextKVAttention, FeedForward
from ..method.settings import SHARE, WEIGHT, Allowed, check_settings, require, setting
from ..method.windows import Window

LARGEST_NEAR_SLOT = 4.0  # `nearest` spreads the heads over slots 1 to this one, evenly on a log scale
SLOT_BIAS = 4.0  # where scores are 0, a slot of 32 with this bias gets 64% of a head's attention
BIASED_SLOTS = 32
MEANS, SHORTEST_MEAN = 3, 4.0  # running means: how many, and over how many tokens the shortest
MEAN_STD = 0.6  # standard deviation of their units, where that of the current token's units is 1
MATCH_SCORE = 15.0  # score that induction-head init gives to a slot with the token looked for
SINK_SCORE = 10.0  # score that it gives to the sink
LINEAR = 6.0  # from here on GELU(z) is z, to 1e-8
PART = Allowed("0 or more, less than 1", lambda value: 0 <= value < 1)
STEADY = 100.0  # square of a step's constant unit, over the sum of all others'


@dataclass(frozen=True)
class PartSettings:
    """Settings of a plug-in, checked under the name of its hook."""

    concern: ClassVar[str]

    def __post_init__(self) -> None:
        check_settings(self, self.concern)


class StructuredBlock(ContextBlock):
    """A ContextBlock that is initialised to encode running means, or the last tokens one by one."""

    @dataclass(frozen=True)
    class Settings(PartSettings):
        concern: ClassVar[str] = "block"
        longest_mean: float = setting(
            0.0,
            "initialised to encode the current token and running means of 4 to so many; 0: random init",
            Allowed("0, or 4 or more", lambda value: value == 0 or value >= SHORTEST_MEAN),
            "tokens",
        )
        last_tokens: int = setting(
            0,
            "initialised to hold so many last tokens, each in units of its own; 0: random init",
            Allowed("0, or 2 or more", lambda value: value == 0 or value >= 2),
            "tokens",
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            one = not (self.longest_mean and self.last_tokens)
            require(one, f"{self.concern}.last_tokens", self.last_tokens, "0 with longest_mean")

    def __init__(self, context_dim: int, hidden_size: int, settings: Settings) -> None:
        """Make the layers; raises ValueError if settings and shapes do not go together."""
        super().__init__(context_dim, hidden_size)
        self.settings = settings
        if settings.longest_mean:
            allowed = f"at most model.hidden_size ({hidden_size}) with {settings.concern}.longest_mean"
            require(context_dim <= hidden_size, "model.context_dim", context_dim, allowed)
        if count := settings.last_tokens:
            least, most = max(2, context_dim // hidden_size + 1), context_dim - 1
            allowed = f"{least} to {most} with these shapes"
            require(least <= count <= most, f"{settings.concern}.last_tokens", count, allowed)
        # Units of each of the last tokens.
        self.place_size = (context_dim - 1) // max(1, settings.last_tokens)

    @torch.no_grad()
    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Phase1Config) -> None:
        """Initialise the weights as the settings say; arguments as of `ContextBlock.init_weights`."""
        if not (self.settings.longest_mean or self.settings.last_tokens):
            return super().init_weights(embeddings, tokens, config)
        mean, axes, deviations = principal_components(embeddings, tokens)
        layout = (
            self.running_means(axes, deviations)
            if self.settings.longest_mean
            else self.shift_register(deviations)
        )
        self.init_linear_recurrence(mean, *layout)

    def running_means(self, axes: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor, float]:
        """Compute an init: half of the units for the current token, half for running means of tokens.

        The first half holds the token's largest principal components, each scaled half-way to equal variance.
        The other holds those of means over `SHORTEST_MEAN` to `longest_mean` tokens, evenly on a log scale,
        all of equal variance. Nothing is random. Takes the result of `principal_components`, and returns the
        arguments of `init_linear_recurrence`.
        """
        averaged = self.context_dim // (2 * MEANS)
        whole = self.context_dim - 1 - MEANS * averaged
        halfway = deviations[:whole].sqrt()
        token = axes[:whole] / (halfway * halfway.square().mean().sqrt())[:, None]
        equal = axes[:averaged] / deviations[:averaged, None]
        longest = math.log10(self.settings.longest_mean)
        decay = 1 - 1 / torch.logspace(math.log10(SHORTEST_MEAN), longest, MEANS)
        means = [equal * scale for scale in MEAN_STD * (1 - decay**2).sqrt()]
        carried = torch.diag(torch.cat([torch.zeros(whole), decay.repeat_interleave(averaged)]))
        variance = (whole + MEANS * averaged * MEAN_STD**2) / self.context_dim
        return carried, torch.cat([token, *means]), variance

    def shift_register(self, deviations: Tensor) -> tuple[Tensor, Tensor, float]:
        """Compute an init as a shift register of the last tokens; arguments as of `running_means`.

        Each token has `place_size` units of its own, along random orthogonal directions. Each step shifts it
        by `place_size` units.
        """
        size, units = self.context_dim - 1, self.place_size
        drawn = self.linear.weight[:units, self.context_dim :].cpu()
        directions = torch.linalg.qr(drawn.T).Q.T * (drawn.shape[1] ** 0.5 / deviations.norm())
        shift = torch.eye(size).roll(units, dims=0)
        shift[:units] = shift[units * self.settings.last_tokens :] = 0
        variance = units * self.settings.last_tokens / self.context_dim
        return shift, F.pad(directions, (0, 0, 0, size - units)), variance

    @torch.no_grad()
    def init_linear_recurrence(self, mean: Tensor, carried: Tensor, weights: Tensor, variance: float) -> None:
        """Initialise the weights so that a step is all but linear: `c' = carried @ c + weights @ (x - mean)`.

        GELU(z) is z where z is large, so all units get one large bias, which the norm subtracts with their
        mean. The norm divides by a constant, since the last unit is constant and larger than all others
        together. Its scale is 0, so contexts are 0 there.

        Args:
            mean: of the tokens, `[hidden_size]`.
            carried: `[context_dim - 1, context_dim - 1]`, with which no context grows.
            weights: `[context_dim - 1, hidden_size]`.
            variance: of the resulting contexts, the mean over units.
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

    Returns:
        mean `[hidden_size]`, axes `[hidden_size, hidden_size]` with the largest variance first, and standard
        deviations along them `[hidden_size]`; on the CPU, float32. An axis' largest component is positive.
        Where tokens do not vary, a deviation is not 0 but a thousandth of the largest, at least 1e-6.
    """
    shares = torch.bincount(tokens.cpu(), minlength=len(embeddings)).float() / len(tokens)
    rows = embeddings.float().cpu()
    mean = shares @ rows
    centred = (rows - mean) * shares[:, None].sqrt()
    variances, axes = torch.linalg.eigh((centred.T @ centred).double())
    deviations = variances.flip(0).clamp(min=0).sqrt()
    deviations = deviations.clamp(min=max(1e-3 * deviations[0].item(), 1e-6))
    axes = axes.T.flip(0)
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return mean, (axes * largest.sign()).float(), deviations.float()


@dataclass(frozen=True)
class LayerSettings(PartSettings):
    """Dropout, and how much of the current token reaches the output."""

    residual: str = setting(
        "on",
        "whether the output head reads the residual of the token embedding",
        {"on": "as published", "off": "without it, the current token is not proposed"},
    )
    current_token_bias: float = setting(0.0, "added to the current token's logit: immediate repeats are rare")
    input_dropout: float = setting(0.0, "on the token embeddings that are read", SHARE, "share")
    layer_dropout: float = setting(0.0, "on what attention adds, in and after feed-forward", SHARE, "share")


class ResidualLayer(nn.Module):
    """A layer with `LayerSettings`; a subclass adds a `feed_forward` and computes `added`."""

    feed_forward: nn.Module

    def __init__(self, settings: LayerSettings) -> None:
        super().__init__()
        self.residual, self.current_token_bias = settings.residual == "on", settings.current_token_bias
        self.input_dropout: nn.Module = nn.Dropout(settings.input_dropout)
        self.layer_dropout: nn.Module = nn.Dropout(settings.layer_dropout)

    def output(self, embeddings: Tensor, added: Tensor, norm: nn.Module) -> Tensor:
        """Compute the hidden state for the output head, `[..., hidden_size]` as both arguments."""
        added = self.layer_dropout(added)
        hidden = norm(embeddings + added)
        return (hidden if self.residual else added) + self.feed_forward(hidden)


SLOT_BIASES = {
    "learned": "a number, trained from 0",
    "per_head": "the same, initialised so that each head prefers a slot, or distance, of its own",
    "nearest": "the same, initialised so that heads prefer slots, or distances, 1 to 4, more of them 1",
}


def initial_biases(slot_bias: str, num_heads: int, slots: int) -> Tensor:
    """Return the initial values of a slot bias, `[num_heads, slots]`, the nearest slot first.

    A preferred slot begins with the same share of its head's attention, however many slots there are.
    """
    biases = torch.zeros(num_heads, slots)
    preferred = SLOT_BIAS + math.log(max(1, slots - 1) / (BIASED_SLOTS - 1))
    if slot_bias == "per_head":
        biases.fill_diagonal_(preferred)
    elif slot_bias == "nearest":
        nearest = torch.logspace(0, 1, num_heads, base=LARGEST_NEAR_SLOT).round().long()
        biases.scatter_(1, nearest.clamp(max=slots - 1)[:, None], preferred)
    return biases


def geometric_offsets(config: ModelConfig) -> list[int]:
    """Return the distances in tokens of geometric slots: `max_contexts` different ones, nearest first.

    They are 0, 1, and then larger by a constant factor, at least by one, up to the reach of uniform slots.
    """
    count, reach = config.max_contexts, config.interval * (config.max_contexts - 1)
    if count < 3:
        return Window(config).offsets
    return [0, *(max(slot, round(reach ** ((slot - 1) / (count - 2)))) for slot in range(1, count))]


class BiasedAttention(ContextKVAttention):
    """Attention to contexts with a learned bias of each slot's score, and a sink.

    The sink is one more slot with a zero value, so the weights of the others sum to less than 1. With either,
    keys have no bias, since softmax is invariant to it.
    """

    def __init__(self, config: ModelConfig, slot_bias: str, sink: bool) -> None:
        super().__init__(config, key_bias=slot_bias == "none" and not sink)
        biases = initial_biases(slot_bias, config.num_heads, config.max_contexts)
        self.slot_bias = None if slot_bias == "none" else nn.Parameter(biases)
        self.sink = nn.Parameter(torch.zeros(config.num_heads)) if sink else None

    def attention_weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if self.slot_bias is not None:
            scores = scores + self.slot_bias
        if self.sink is None:
            return super().attention_weights(scores, mask)
        sink = self.sink.to(scores.dtype).expand(len(scores), -1)[..., None]
        mask = mask if mask is None else F.pad(mask, (0, 1), value=True)
        return super().attention_weights(torch.cat([scores, sink], dim=-1), mask)[..., :-1]

    @torch.no_grad()
    def init_induction(self, block: StructuredBlock) -> None:
        """Initialise each head to find the current token at one place of a context, and read its successor.

        Args:
            block: a trained one with `last_tokens`.
        """
        count = block.settings.last_tokens
        size, units = block.context_dim, block.place_size
        axes = min(units, self.head_dim)
        directions = block.linear.weight[:axes, size:]
        shift = block.linear.bias[:axes] - LINEAR
        strength = MATCH_SCORE * self.head_dim**0.5 / axes
        identity = torch.eye(axes).to(directions)
        for parameter in (*self.q.parameters(), self.k.weight, *self.v.parameters(), self.out.weight):
            parameter.zero_()
        for head in range(self.num_heads):
            rows, place = slice(head * self.head_dim, head * self.head_dim + axes), head % (count - 1)
            self.q.weight[rows] = directions * strength
            self.q.bias[rows] = shift * strength
            self.k.weight[rows, (place + 1) * units :][:, :axes] = identity
            self.v.weight[rows, place * units :][:, :axes] = identity
            self.out.weight[:, rows] = directions.T * (len(directions.T) / axes) ** 0.5
        if self.sink is not None:
            self.sink.fill_(SINK_SCORE)


class SlotAttention(ResidualLayer):
    """Attention to contexts and feed-forward, with the published layer's shapes; see `Settings`."""

    @dataclass(frozen=True)
    class Settings(LayerSettings):
        concern: ClassVar[str] = "attention"
        slots: str = setting(
            "uniform",
            "how far apart the slots of a window lie",
            {"uniform": "the interval, as published", "geometric": "ever further, as far as uniform ones"},
        )
        slot_bias: str = setting(
            "none", "what is added to a slot's score, by head", {"none": "nothing", **SLOT_BIASES}
        )
        sink: str = setting(
            "none",
            "whether a head may attend no slot",
            {"none": "", "learned": "its score is a number a head"},
        )
        heads: str = setting(
            "random",
            "how heads are initialised",
            {
                "random": "random weights",
                "induction": "with last_tokens: they find the current token and read what followed",
            },
        )
        copy_weight: float = setting(
            0.0, "of the probability, outside of training, for tokens that followed similar contexts", PART
        )
        copy_sharpness: float = setting(8.0, "how similar: the factor of the cosine of contexts", WEIGHT)

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        """Make the layers; raises ValueError if settings and shapes do not go together."""
        super().__init__(settings)
        fits = config.anchor == "current" or settings.slots == "uniform"
        require(fits, "model.anchor", config.anchor, f"current with {settings.concern}.slots=geometric")
        fits = config.anchor == "current" or not settings.copy_weight
        require(fits, "model.anchor", config.anchor, f"current with {settings.concern}.copy_weight")
        self.settings, self.masked = settings, config.kv_method == "variable"
        copying = Copying(settings.copy_weight, settings.copy_sharpness)
        self.copying = copying if copying.weight else None
        self.attention = BiasedAttention(config, settings.slot_bias, settings.sink == "learned")
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size, settings.layer_dropout)

    def slot_offsets(self, config: ModelConfig) -> list[int]:
        """Return the distance back of each slot in tokens, ascending from 0."""
        return geometric_offsets(config) if self.settings.slots == "geometric" else Window(config).offsets

    def init_from_block(self, block: nn.Module) -> None:
        """Initialise heads that find tokens in the contexts of a trained block.

        Raises:
            ValueError: `heads` is induction, and the block has no `last_tokens`.
        """
        if self.settings.heads == "induction":
            if not isinstance(block, StructuredBlock) or not block.settings.last_tokens:
                allowed = "random, or induction with last_tokens of the block"
                raise ValueError(f"{self.settings.concern}.heads is 'induction'; allowed: {allowed}.")
            self.attention.init_induction(block)

    def forward(self, embeddings: Tensor, window: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the hidden state and the attention weights; see `method.model.Parts`."""
        embeddings = self.input_dropout(embeddings)
        attended, weights = self.attention.attend(embeddings, window, present if self.masked else None)
        return self.output(embeddings, attended, self.attention.norm), weights
