"""The layer that Phase 2 trains: its interface, and the published layer of attention and feed-forward."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig, Phase1Config
from .copying import Copying


class Layer(nn.Module):
    """The optional attributes and methods of a layer, with their defaults.

    A layer may inherit from this class, but any `nn.Module` will do (see `block.attribute_or_default`). It is
    everything that Phase 2 trains. Its constructor takes a `ModelConfig`. The layer computes the hidden state
    from which the output head predicts the next token. Its arguments depend on `reads`:

    - "contexts": `forward(embeddings [n, hidden_size], window [n, slots, context_dim], present bool [n,
      slots])` returns hidden states `[n, hidden_size]`, or a pair of hidden states and attention weights
      `[n, heads, slots]`. Slots that are not present are zero.
    - "tokens": `forward(embeddings [rows, length, hidden_size], start)` reads rows of consecutive tokens, and
      returns the hidden states from column `start` on, `[rows, length - start, hidden_size]`. The hidden
      state of a column may not depend on later columns.

    A model whose layer reads tokens has no block (`ContextKV.context_block` is None), no Phase 1 and no
    contexts.

    Attributes:
        Settings: the dataclass of the constructor's argument `settings`; None if a layer has no settings.
        reads: "contexts" or "tokens"; must be a class attribute.
        chunk: how many consecutive positions an epoch visits together; None means 1, or 64 if the layer reads
            tokens.
        history: for a layer that reads tokens, the number of preceding tokens that it gets in training.
        evaluation_history: the number of preceding tokens in evaluation; None means the same as `history`.
        current_token_bias: a number that is added to the logit of the current token.
        copying: how the model copies outside of training; None turns copying off.
    """

    Settings: Any = None
    reads: Literal["contexts", "tokens"] = "contexts"
    chunk: int | None = None
    history: int = 0
    evaluation_history: int | None = None
    current_token_bias: float = 0.0
    copying: Copying | None = None

    def slot_offsets(self, config: ModelConfig) -> list[int]:
        """Return how many tokens back each slot of the window lies, ascending from 0."""
        return [slot * config.interval for slot in range(config.max_contexts)]

    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Phase1Config) -> None:
        """Initialize the weights before Phase 2; takes the arguments of `Block.init_weights`."""


def weight_of(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the full weight `[out, in]` of a Linear, dequantized and including any adapter.

    If another module has replaced the Linear, its weight is computed by applying the module to unit vectors
    of type `dtype`.
    """
    if type(layer) is nn.Linear:
        return layer.weight
    linear: Any = layer
    outputs = linear(torch.eye(linear.in_features, dtype=dtype, device=linear.weight.device))
    return (outputs if linear.bias is None else outputs - linear.bias).T.to(dtype)


class ContextKVAttention(nn.Module):
    """Attention from one token to its window of contexts: `LayerNorm(x + attention(x, window))`.

    Scores and weighted sums are computed from the contexts, without forming keys and values. With
    `k_s = W_k c_s + b_k` and a head's query q, the score is `q . k_s = (W_k^T q) . c_s + q . b_k`. Softmax
    drops the last term, which is the same for all slots. The output is `sum_s w_s (W_v c_s + b_v) =
    W_v (sum_s w_s c_s) + b_v sum_s w_s`. The last sum is kept because the weights `w_s` do not add up to 1
    with dropout. `k.bias` is multiplied by 0 so that its gradient is zero instead of None; DDP waits for
    missing gradients.
    """

    def __init__(self, config: ModelConfig, key_bias: bool = True) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.head_dim = config.num_heads, size // config.num_heads
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(config.context_dim, size, bias=key_bias)
        self.v = nn.Linear(config.context_dim, size)
        self.out = nn.Linear(size, size)
        self.dropout = nn.Dropout(config.attention_dropout)
        self.norm = nn.LayerNorm(size)

    def forward(self, embeddings: Tensor, window: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return hidden states `[n, hidden_size]` and attention weights `[n, num_heads, slots]`.

        Args:
            embeddings: x, the normed token embeddings, `[n, hidden_size]`.
            window: the contexts that each position sees, `[n, slots, context_dim]`.
            mask: bool `[n, slots]`, True for slots that attention may use; None means all slots.

        Dropout is not applied to the returned weights.
        """
        attended, weights = self.attend(embeddings, window, mask)
        return self.norm(embeddings + attended), weights

    def attend(self, embeddings: Tensor, window: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what attention adds to the embeddings, and the attention weights; see `forward`."""
        heads = (self.num_heads, self.head_dim)
        query = self.q(embeddings).unflatten(1, heads) * self.head_dim**-0.5
        key_weight = weight_of(self.k, query.dtype).unflatten(0, heads)  # (heads, head_dim, context_dim)
        value_weight = weight_of(self.v, query.dtype).unflatten(0, heads)
        context_query = torch.einsum("nhd,hdc->nhc", query, key_weight)
        window = window.to(context_query.dtype)
        weights = self.attention_weights(context_query @ window.transpose(1, 2), mask)
        dropped = self.dropout(weights)
        mixed = torch.einsum("nhc,hdc->nhd", dropped @ window, value_weight)
        bias = self.v.bias if self.k.bias is None else self.v.bias + 0 * self.k.bias
        values = mixed + dropped.sum(dim=-1, keepdim=True) * bias.unflatten(0, heads)
        return self.out(values.flatten(1)), weights

    def attention_weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Turn scores `[n, num_heads, slots]` into attention weights of the same shape, float32 or wider."""
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


class FeedForward(nn.Module):
    """A feed-forward layer with a norm at its end: `LayerNorm(Linear(GELU(Linear(h))))`."""

    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.dropout(self.down(self.dropout(F.gelu(self.up(hidden))))))


class AttentionLayer(Layer):
    """The published layer: attention to a window of contexts, followed by feed-forward.

    With `kv_method="fixed"`, attention treats slots without a context as zero vectors; with "variable",
    it masks these slots.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_masked = config.kv_method == "variable"
        self.attention = ContextKVAttention(config)
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, embeddings: Tensor, window: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weights = self.attention(embeddings, window, present if self.is_masked else None)
        return hidden + self.feed_forward(hidden), weights
