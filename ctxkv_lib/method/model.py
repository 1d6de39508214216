"""The layers: the recurrent ContextBlock, attention over contexts, feed-forward, and their dropout."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig

CONTEXT_WEIGHT_STD = 0.1
CONTEXT_BIAS_STD = 0.01
NEAR = 4.0  # the furthest of the slots that heads begin with, from 1 on, evenly on a log scale
OWN_SLOT = 4.0  # where scores are 0, a head's own slot of 32 begins with 64% of its attention
# Running means: how many, of how many tokens the shortest, and their units' standard deviation, where that of
# the units that hold the token itself is 1.
MEANS, SHORTEST_MEAN, MEAN_STD = 3, 4.0, 0.6
LOOK_UP = 15.0  # score of a slot that holds the token looked for, where it begins
NO_SLOT = 10.0  # score of attending none of them, there
LINEAR = 6.0  # from here on GELU(z) is z, to 1e-8
STEADY = 100.0  # square of a step's steady unit, over the sum of all others'


class ContextBlock(nn.Module):
    """One step of the recurrence: `c' = LayerNorm(c + GELU(Linear(concat(c, x))))`.

    The token half of the Linear depends on the token alone, so it is projected apart
    (`project_tokens`): once for each distinct token instead of once for each position.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.context_dim = config.context_dim
        self.linear = nn.Linear(config.context_dim + config.hidden_size, config.context_dim)
        self.norm = nn.LayerNorm(config.context_dim)
        nn.init.normal_(self.linear.weight, std=CONTEXT_WEIGHT_STD)
        nn.init.normal_(self.linear.bias, std=CONTEXT_BIAS_STD)

    @torch.no_grad()
    def scale_weights(self, std: float) -> None:
        """Bring weights as they were drawn to another standard deviation."""
        self.linear.weight.mul_(std / CONTEXT_WEIGHT_STD)

    @torch.no_grad()
    def hold_means(self, mean: Tensor, axes: Tensor, deviations: Tensor, longest: float) -> None:
        """Bring weights to ones of which nothing is left to chance.

        Half of the units hold the largest principal components of the token just read, each scaled half-way
        to the others'. The rest hold those of running means, all of one scale: of `SHORTEST_MEAN` to
        `longest` tokens, evenly on a log scale.

        Args:
            mean: of the tokens' normed embeddings, `[hidden_size]`.
            axes: their principal ones, largest first, `[hidden_size, hidden_size]`; no fewer than units.
            deviations: the standard ones along these, `[hidden_size]`, none 0.
        """
        averaged = self.context_dim // (2 * MEANS)
        whole = self.context_dim - 1 - MEANS * averaged
        halfway = deviations[:whole].sqrt()
        token = axes[:whole] / (halfway * halfway.square().mean().sqrt())[:, None]
        equal = axes[:averaged] / deviations[:averaged, None]
        reach = torch.logspace(math.log10(SHORTEST_MEAN), math.log10(longest), MEANS)
        kept = 1 - 1 / reach
        means = [equal * scale for scale in MEAN_STD * (1 - kept**2).sqrt()]
        self.make_linear(
            torch.diag(torch.cat([torch.zeros(whole), kept.repeat_interleave(averaged)])),
            torch.cat([token, *means]),
            mean,
            variance=(whole + MEANS * averaged * MEAN_STD**2) / self.context_dim,
        )

    @torch.no_grad()
    def hold_tokens(self, mean: Tensor, deviations: Tensor, count: int) -> None:
        """Bring weights to ones with which a context is the last `count` tokens, one by one.

        Each is in `place_size` units of its own, along as many random directions at right angles, and moves
        on by as many units with each token read.

        Args:
            mean, deviations: as of `hold_means`.
        """
        size, units = self.context_dim - 1, self.place_size(count)
        drawn = self.linear.weight[:units, self.context_dim :].cpu()
        directions = torch.linalg.qr(drawn.T).Q.T * (drawn.shape[1] ** 0.5 / deviations.norm())
        moved = torch.eye(size).roll(units, dims=0)
        moved[:units] = moved[units * count :] = 0
        variance = units * count / self.context_dim
        self.make_linear(moved, F.pad(directions, (0, 0, 0, size - units)), mean, variance)

    def place_size(self, count: int) -> int:
        """Units for each of `count` tokens."""
        return (self.context_dim - 1) // count

    @torch.no_grad()
    def make_linear(self, carried: Tensor, weights: Tensor, mean: Tensor, variance: float) -> None:
        """Bring weights to ones with which a step is all but linear.

        It is `c' = carried @ c + weights @ (x - mean)`. GELU(z) is z where z is large, so all units get one
        large bias, which the norm takes off again, with what little they have in common. And the norm divides
        by the same each time, since one unit is larger than all others together: the last, which is the same
        whatever is read. Its scale is 0, so that 0 is all that contexts have of it.

        Args:
            carried: `[context_dim - 1, context_dim - 1]`, which lets no context grow.
            weights: `[context_dim - 1, hidden_size]`.
            mean: of the tokens, `[hidden_size]`.
            variance: of the contexts that this gives, the mean over units.
        """
        size = self.context_dim
        steady = math.sqrt(STEADY * variance * size)
        self.linear.weight[:, :size] = F.pad(carried, (0, 1, 0, 1)) - torch.eye(size)
        self.linear.weight[:, size:] = F.pad(weights, (0, 0, 0, 1))
        self.linear.bias.copy_(LINEAR - F.pad(weights @ mean, (0, 1), value=-steady))
        self.norm.weight.fill_(math.sqrt(variance + steady**2 / size * (1 - 1 / size)))
        self.norm.bias.fill_(steady / size)
        self.norm.weight[-1] = self.norm.bias[-1] = 0

    def project_tokens(self, embeddings: Tensor) -> Tensor:
        """Token half of the Linear, bias included: `[..., hidden_size]` to `[..., context_dim]`."""
        return F.linear(embeddings, self.linear.weight[:, self.context_dim :], self.linear.bias)

    def forward(self, contexts: Tensor, token_half: Tensor) -> Tensor:
        """Next contexts `[n, context_dim]` from the previous ones and `project_tokens` of the tokens."""
        return self.norm(self.unnormed(contexts, token_half))

    def unnormed(self, contexts: Tensor, token_half: Tensor) -> Tensor:
        """`c + GELU(Linear(concat(c, x)))`, as `forward`."""
        mixed = torch.addmm(token_half, contexts, self.linear.weight[:, : self.context_dim].T)
        return F.gelu(mixed).add_(contexts)


class Dropout(NamedTuple):
    """Factors of dropout for n positions, 0 or 1 / (1 - p) each, by the place where they act.

    Drawn for a whole batch at once, they are the same however the batch is cut afterwards.
    """

    embeddings: Tensor | None  # (n, hidden_size)
    weights: Tensor | None  # (n, num_heads, slots)
    attended: Tensor | None  # (n, hidden_size)
    inner: Tensor | None  # (n, intermediate_size)
    added: Tensor | None  # (n, hidden_size)

    def rows(self, rows: slice) -> "Dropout":
        return Dropout(*(factors if factors is None else factors[rows] for factors in self))


NOT_DRAWN = Dropout(None, None, None, None, None)


class Dropped(nn.Dropout):
    """Dropout by factors that were drawn before; where none were, it draws."""

    def forward(self, values: Tensor, factors: Tensor | None = None) -> Tensor:
        return super().forward(values) if factors is None else values * factors


def first_biases(slot_bias: str, num_heads: int, slots: int) -> Tensor:
    """What is added to scores before anything is trained, `[num_heads, slots]`, the nearest slot first."""
    begins = torch.zeros(num_heads, slots)
    if slot_bias == "own":
        begins.fill_diagonal_(OWN_SLOT)
    elif slot_bias == "near":
        near = torch.logspace(0, 1, num_heads, base=NEAR).round().long()
        begins.scatter_(1, near.clamp(max=slots - 1)[:, None], OWN_SLOT)
    return begins


class ContextKVAttention(nn.Module):
    """Attention of one token over its window of contexts.

    Keys and values are never formed. With `k_s = W_k c_s + b_k` and a head's query q, the score is
    `q . k_s = (W_k^T q) . c_s + q . b_k`, whose last term is the same for all slots: softmax drops it.
    The output is `sum_s w_s (W_v c_s + b_v) = W_v (sum_s w_s c_s) + b_v sum_s w_s`, where the last sum is not
    1 under dropout. So scores and mixes are taken on the raw contexts. `k.bias` takes part with weight 0: its
    gradient is zero, as it should be, and not missing, which a distributed wrapper would wait for. A learned
    slot bias, which does change the softmax, or a sink takes its place. The sink is one slot more of which
    nothing is read: weights then sum to less than 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        plain = config.slot_bias == config.sink == "none"
        self.k = nn.Linear(config.context_dim, config.hidden_size, bias=plain)
        self.v = nn.Linear(config.context_dim, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.slot_bias = None
        if config.slot_bias != "none":
            biases = first_biases(config.slot_bias, config.num_heads, config.max_contexts)
            self.slot_bias = nn.Parameter(biases)
        self.sink = nn.Parameter(torch.zeros(config.num_heads)) if config.sink == "learned" else None
        self.dropout = Dropped(config.attention_dropout)
        self.out_dropout = Dropped(config.layer_dropout)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self, embeddings: Tensor, window: Tensor, present: Tensor | None, dropout: Dropout = NOT_DRAWN
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`LayerNorm(x + attention(x, window))`.

        Args:
            embeddings: x, the normed token embeddings, `[n, hidden_size]`.
            window: contexts seen by each position, `[n, slots, context_dim]`.
            present: bool `[n, slots]`, which slots may be attended; None attends all.
            dropout: factors; those that are not drawn are drawn here.

        Returns:
            hidden and what attention added to it, both `[n, hidden_size]`, and the attention weights before
            dropout `[n, num_heads, slots]`.
        """
        query = self.q(embeddings).unflatten(1, (self.num_heads, self.head_dim)) * self.head_dim**-0.5
        key_weight = self.k.weight.unflatten(
            0, (self.num_heads, self.head_dim)
        )  # (heads, head_dim, context_dim)
        value_weight = self.v.weight.unflatten(0, (self.num_heads, self.head_dim))
        context_query = torch.einsum("nhd,hdc->nhc", query, key_weight)
        window = window.to(context_query.dtype)
        scores = context_query @ window.transpose(1, 2)  # (n, heads, slots)
        if self.slot_bias is not None:
            scores = scores + self.slot_bias
        if present is not None:
            scores = scores.masked_fill(~present[:, None], -torch.inf)
        weights = self._weights(scores)
        dropped = self.dropout(weights, dropout.weights)
        mixed = torch.einsum("nhc,hdc->nhd", dropped @ window, value_weight)
        bias = self.v.bias if self.k.bias is None else self.v.bias + 0 * self.k.bias
        values = mixed + dropped.sum(dim=-1, keepdim=True) * bias.unflatten(
            0, (self.num_heads, self.head_dim)
        )
        attended = self.out_dropout(self.out(values.flatten(1)), dropout.attended)
        return self.norm(embeddings + attended), attended, weights

    def _weights(self, scores: Tensor) -> Tensor:
        """Of scores `[n, num_heads, slots]`, as many."""
        if self.sink is None:
            return scores.softmax(dim=-1)
        sink = self.sink.to(scores.dtype).expand(len(scores), -1)[..., None]
        return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]

    @torch.no_grad()
    def look_up(self, block: ContextBlock, count: int) -> None:
        """Let each head look for the token just read at one place of the contexts, and bring what followed.

        Args:
            block: holds the last `count` tokens, 2 or more (`hold_tokens`).
        """
        size, units = block.context_dim, block.place_size(count)
        axes = min(units, self.head_dim)
        directions = block.linear.weight[:axes, size:]
        shift = block.linear.bias[:axes] - LINEAR
        strength = LOOK_UP * self.head_dim**0.5 / axes
        as_it_is = torch.eye(axes).to(directions)
        for parameter in (*self.q.parameters(), self.k.weight, *self.v.parameters(), self.out.weight):
            parameter.zero_()
        for head in range(self.num_heads):
            rows = slice(head * self.head_dim, head * self.head_dim + axes)
            place = head % (count - 1)
            self.q.weight[rows] = directions * strength
            self.q.bias[rows] = shift * strength
            self.k.weight[rows, (place + 1) * units :][:, :axes] = as_it_is
            self.v.weight[rows, place * units :][:, :axes] = as_it_is
            self.out.weight[:, rows] = directions.T * (len(directions.T) / axes) ** 0.5
        if self.sink is not None:
            self.sink.fill_(NO_SLOT)


class FeedForward(nn.Module):
    """`LayerNorm(Linear(GELU(Linear(h))))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = Dropped(config.layer_dropout)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden: Tensor, dropout: Dropout = NOT_DRAWN) -> Tensor:
        inner = self.dropout(F.gelu(self.up(hidden)), dropout.inner)
        return self.norm(self.dropout(self.down(inner), dropout.added))
