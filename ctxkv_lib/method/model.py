"""The model: recurrent ContextBlock, attention over contexts, feed-forward, output tied to a frozen table.

Plug-ins may take the place of ContextBlock and of attention with feed-forward (`Parts`).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import GPT2_VOCAB_SIZE, ModelConfig, Phase1Config
from .copying import Copying
from .losses import add_to_logit, frozen_head_cross_entropy
from .windows import Window

CONTEXT_WEIGHT_STD = 0.1
CONTEXT_BIAS_STD = 0.01


class ContextBlock(nn.Module):
    """One step of the recurrence: `c' = LayerNorm(c + GELU(Linear(concat(c, x))))`.

    What the Linear makes of x depends on the token alone: `project_inputs` computes it once a distinct token.
    """

    def __init__(self, context_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.linear = nn.Linear(context_dim + hidden_size, context_dim)
        self.norm = nn.LayerNorm(context_dim)
        nn.init.normal_(self.linear.weight, std=CONTEXT_WEIGHT_STD)
        nn.init.normal_(self.linear.bias, std=CONTEXT_BIAS_STD)

    @torch.no_grad()
    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Phase1Config) -> None:
        """Initialise the weights before Phase 1: scale those that were drawn to `weight_std`.

        `embeddings`, `[num_distinct, hidden_size]`, are the normed ones of the distinct training tokens;
        `tokens`, int64 `[n]`, is the training stream as rows of them.
        """
        self.linear.weight.mul_(config.weight_std / CONTEXT_WEIGHT_STD)

    def project_inputs(self, embeddings: Tensor) -> Tensor:
        """Project token embeddings `[..., hidden_size]` to what `forward` takes, `[..., context_dim]`.

        They stay as they are for an adapter in the place of the Linear, which takes context and embedding.
        """
        if type(self.linear) is not nn.Linear:
            return embeddings
        return F.linear(embeddings, self.linear.weight[:, self.context_dim :], self.linear.bias)

    def forward(self, contexts: Tensor, inputs: Tensor) -> Tensor:
        """Compute the next contexts from the previous ones and `project_inputs`, all `[n, context_dim]`."""
        if type(self.linear) is nn.Linear:
            mixed = torch.addmm(inputs, contexts, self.linear.weight[:, : self.context_dim].T)
        else:
            mixed = self.linear(torch.cat([contexts, inputs], dim=-1))
        return self.norm(F.gelu(mixed).add_(contexts))


def project_inputs(block: nn.Module, embeddings: Tensor) -> Tensor:
    """Compute what a block's `forward` takes for each token: its `project_inputs`, or the embeddings."""
    return getattr(block, "project_inputs", lambda inputs: inputs)(embeddings)


def weight_of(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the weight `[out, in]` that a Linear applies, with what an adapter adds to it, not quantised.

    What took the place of a Linear is asked for its outputs of unit vectors, in `dtype`.
    """
    if type(layer) is nn.Linear:
        return layer.weight
    linear: Any = layer
    outputs = linear(torch.eye(linear.in_features, dtype=dtype, device=linear.weight.device))
    return (outputs if linear.bias is None else outputs - linear.bias).T.to(dtype)


class ContextKVAttention(nn.Module):
    """Attention of one token over its window of contexts: `LayerNorm(x + attention(x, window))`.

    Keys and values are never formed. With `k_s = W_k c_s + b_k` and a head's query q, the score is
    `q . k_s = (W_k^T q) . c_s + q . b_k`, whose last term is the same for all slots: softmax drops it.
    The output is `sum_s w_s (W_v c_s + b_v) = W_v (sum_s w_s c_s) + b_v sum_s w_s`, where the last sum is not
    1 under dropout. So scores and mixes are computed on the raw contexts. `k.bias` takes part with weight 0:
    its gradient is zero, as it should be, and not missing, which a distributed wrapper would wait for.
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
        """Compute hidden `[n, hidden_size]` and the attention weights before dropout `[n, num_heads, slots]`.

        Args:
            embeddings: x, the normed token embeddings, `[n, hidden_size]`.
            window: contexts seen by each position, `[n, slots, context_dim]`.
            mask: bool `[n, slots]`, which slots may be attended; None attends all.
        """
        attended, weights = self.attend(embeddings, window, mask)
        return self.norm(embeddings + attended), weights

    def attend(self, embeddings: Tensor, window: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute what attention adds to the embeddings, and its weights; arguments as of `forward`."""
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
        """Turn scores `[n, num_heads, slots]` into weights of the same shape."""
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        return scores.softmax(dim=-1)


class FeedForward(nn.Module):
    """`LayerNorm(Linear(GELU(Linear(h))))`."""

    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.dropout(self.down(self.dropout(F.gelu(self.up(hidden))))))


class Parts(NamedTuple):
    """What builds the parts of a model that a user may replace.

    Attributes:
        block: makes the recurrence from `(context_dim, hidden_size)`; see `ContextBlock`. It may lack
            `init_weights` and `project_inputs`; without the latter, `forward` gets the normed embeddings.
        attention: makes from a `ModelConfig` all that Phase 2 trains, in the place of attention and
            feed-forward. Called as `attention(embeddings [n, hidden_size], window [n, slots, context_dim],
            present bool [n, slots])`, it returns the hidden state for the output head, `[n, hidden_size]`, or
            a pair of that and attention weights `[n, heads, slots]`. It may have `slot_offsets(config) ->
            list[int]`, the distances of its slots in tokens; `chunk`, how many consecutive positions an epoch
            visits together; `current_token_bias`, a number added to the current token's logit; `copying`, a
            `copying.Copying`; and `init_from_block(block)`, which initialises it from the trained block.
    """

    block: Callable[[int, int], nn.Module] = ContextBlock
    attention: Callable[[ModelConfig], nn.Module] | None = None


class ContextKV(nn.Module):
    """Frozen token table, recurrent contexts, one attention and feed-forward layer, output tied to the table.

    The output head *is* the table (`hidden @ wte.weight.T`). Table and embedding norm are never trained.

    Attributes:
        has_contexts: whether Phase 1 trains a ContextBlock, whose contexts are cached.
        log_unigram: a bias of the logits, float32 `[vocab_size]`, never trained; None without.
        window: which contexts a position sees.
        slot_offsets: how many tokens back each slot lies, for reports; None without contexts.
        chunk: consecutive positions that an epoch visits together.
    """

    has_contexts = True
    slot_offsets: list[int] | None = None
    chunk: int

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int = GPT2_VOCAB_SIZE,
        has_unigram: bool = False,
        parts: Parts = Parts(),  # noqa: B008 (immutable)
    ) -> None:
        """Make all layers; their random weights depend on torch's seed and the shapes alone."""
        super().__init__()
        self.build_frozen(config, vocab_size, has_unigram)
        block: Any = parts.block(config.context_dim, config.hidden_size)
        block.context_dim = config.context_dim  # which a user's class may not keep
        self.context_block = block
        if parts.attention is None:
            self.attention: nn.Module = ContextKVAttention(config)
            self.feed_forward: nn.Module | None = FeedForward(config.hidden_size, config.intermediate_size)
        else:
            self.attention, self.feed_forward = parts.attention(config), None
        self.chunk = getattr(self.attention, "chunk", 1)
        offsets = getattr(self.attention, "slot_offsets", None)
        self.window = Window(config, offsets and offsets(config))
        self.slot_offsets = self.window.offsets
        self.set_phase(2)

    def build_frozen(self, config: ModelConfig, vocab_size: int, has_unigram: bool) -> None:
        """Make what is never trained."""
        self.config = config
        self.wte = nn.Embedding(vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size)
        self.register_buffer("log_unigram", torch.zeros(vocab_size) if has_unigram else None)

    def set_phase(self, phase: Literal[1, 2]) -> None:
        """Train the ContextBlock (1) or attention and feed-forward (2), and nothing else."""
        self.requires_grad_(False)
        for part in (self.context_block,) if phase == 1 else (self.attention, self.feed_forward):
            if part is not None:
                part.requires_grad_(True)

    def trained_weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the current phase trains, by name."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def load_table(self, table: Tensor, log_unigram: Tensor | None = None) -> None:
        """Copy in what is frozen: the table, float32 `[vocab_size, hidden_size]`, and `log_unigram`."""
        self.wte.weight.data.copy_(table)
        self.log_unigram = log_unigram

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def init_attention(self, ids: Tensor, config: Phase1Config) -> None:
        """Let attention initialise its weights before Phase 2, here from the trained ContextBlock.

        `ids`, integers `[n]`, are the tokens that Phase 1 trains on.
        """
        getattr(self.attention, "init_from_block", lambda _: None)(self.context_block)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up normed token embeddings of ids of any shape: `[..., hidden_size]`."""
        return self.embedding_norm(self.wte(input_ids))

    def attend(self, embeddings: Tensor, window: Tensor, present: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute what the output head reads, `[n, hidden_size]`, and attention weights.

        These are `[n, num_heads, slots]`, or None if an attention plug-in returns none.

        Args:
            embeddings: normed token embeddings `[n, hidden_size]`.
            window: contexts each position sees, `[n, slots, context_dim]`, zero where there is none.
            present: bool `[n, slots]`, the slots that hold a context. With `kv_method="fixed"` the
                others are attended as zeros; with "variable" they are masked.
        """
        if self.feed_forward is None:
            if not torch.is_autocast_enabled():  # which would cast it where it is used
                window = window.to(embeddings.dtype)
            output = self.attention(embeddings, window, present)
            return output if isinstance(output, tuple) else (output, None)
        mask = present if self.config.kv_method == "variable" else None
        hidden, weights = self.attention(embeddings, window, mask)
        return hidden + self.feed_forward(hidden), weights

    def logits(self, hidden: Tensor, read: Tensor) -> Tensor:
        """Compute logits `[..., vocab_size]`; `read` are the current tokens, integers `[...]`."""
        logits = F.linear(hidden, self.wte.weight, self.log_unigram)
        if self.current_token_bias:
            add_to_logit(logits, read, self.current_token_bias)
        return logits

    def losses(
        self, hidden: Tensor, read: Tensor, targets: Tensor, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute loss and correctness of each prediction, as `frozen_head_cross_entropy`.

        `table` is the token table in the dtype of the matrix products; None takes the model's own.
        """
        table = self.wte.weight if table is None else table
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # to sum in
        bias, token_bias = self.log_unigram, self.current_token_bias
        return frozen_head_cross_entropy(hidden, table, targets, bias, read, token_bias)

    @property
    def current_token_bias(self) -> float:
        return getattr(self.attention, "current_token_bias", 0.0)

    @property
    def copying(self) -> Copying | None:
        """How the model copies outside of training, if it does."""
        return getattr(self.attention, "copying", None)
