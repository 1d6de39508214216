"""The Context-KV language model, as a transformers model."""

import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .checks import require
from .config import ModelConfig
from .context_cache import ContextCache

# Named for transformers 4: loading a saved model, it takes along only the files that this one names.
from .windows import slot_positions as slot_positions

CONTEXT_WEIGHT_STD = 0.1
CONTEXT_BIAS_STD = 0.01
ATTENDED_AT_ONCE = 2048  # positions whose windows are gathered at a time, to bound their memory
# What transformers 5.24 renamed.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class ContextKVConfig(PretrainedConfig):
    """`ModelConfig` in transformers' clothes: the same fields, defaults and checks.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    model_type = "context_kv"
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012 (transformers' own form)
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        names = [f.name for f in dataclasses.fields(ModelConfig)]
        shapes = ModelConfig(**{name: kwargs.pop(name) for name in names if name in kwargs})
        for name, value in dataclasses.asdict(shapes).items():
            setattr(self, name, value)
        self.num_hidden_layers = 1
        self.use_cache = kwargs.pop("use_cache", True)
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)


class ContextBlock(nn.Module):
    """One step of the recurrence: `c' = LayerNorm(c + GELU(Linear(concat(c, x))))`.

    The token half of the Linear depends on the token alone, so it is projected apart
    (`project_tokens`): once for each distinct token instead of once for each position.
    """

    def __init__(self, config: ContextKVConfig) -> None:
        super().__init__()
        self.context_dim = config.context_dim
        self.linear = nn.Linear(config.context_dim + config.hidden_size, config.context_dim)
        self.norm = nn.LayerNorm(config.context_dim)
        nn.init.normal_(self.linear.weight, std=CONTEXT_WEIGHT_STD)
        nn.init.normal_(self.linear.bias, std=CONTEXT_BIAS_STD)

    def project_tokens(self, embeddings: Tensor) -> Tensor:
        """Token half of the Linear, bias included: `[..., hidden_size]` to `[..., context_dim]`."""
        return F.linear(embeddings, self.linear.weight[:, self.context_dim :], self.linear.bias)

    def forward(self, contexts: Tensor, token_half: Tensor) -> Tensor:
        """Next contexts `[n, context_dim]` from the previous ones and `project_tokens` of the tokens."""
        mixed = torch.addmm(token_half, contexts, self.linear.weight[:, : self.context_dim].T)
        return self.norm(F.gelu(mixed).add_(contexts))


class ContextKVAttention(nn.Module):
    """Attention of one token over its window of contexts.

    Keys and values are never formed. With `k_s = W_k c_s + b_k` and a head's query q, the score is
    `q . k_s = (W_k^T q) . c_s + q . b_k`, whose last term is the same for all slots: softmax drops it.
    The output is `sum_s w_s (W_v c_s + b_v) = W_v (sum_s w_s c_s) + b_v sum_s w_s`, where the last sum is not
    1 under dropout. So scores and mixes are taken on the raw contexts. `k.bias` takes part with weight 0: its
    gradient is zero, as it should be, and not missing, which a distributed wrapper would wait for.
    """

    def __init__(self, config: ContextKVConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.k = nn.Linear(config.context_dim, config.hidden_size)
        self.v = nn.Linear(config.context_dim, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_dropout)
        self.norm = nn.LayerNorm(config.hidden_size)

    def drawn_dropout(self, count: int, slots: int) -> Tensor:
        """Factors of attention weights, drawn as `forward` draws them: `[count, num_heads, slots]`."""
        return self.dropout(self.k.weight.new_ones(count, self.num_heads, slots))

    def forward(
        self, embeddings: Tensor, window: Tensor, present: Tensor | None, dropout: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`LayerNorm(x + attention(x, window))`.

        Args:
            embeddings: x, the normed token embeddings, `[n, hidden_size]`.
            window: contexts seen by each position, `[n, slots, context_dim]`.
            present: bool `[n, slots]`, which slots may be attended; None attends all.
            dropout: `[n, num_heads, slots]`, rows of `drawn_dropout`; None draws them here.

        Returns:
            hidden `[n, hidden_size]` and the attention weights before dropout `[n, num_heads, slots]`.
        """
        query = self.q(embeddings).unflatten(1, (self.num_heads, self.head_dim)) * self.head_dim**-0.5
        key_weight = self.k.weight.unflatten(
            0, (self.num_heads, self.head_dim)
        )  # (heads, head_dim, context_dim)
        value_weight = self.v.weight.unflatten(0, (self.num_heads, self.head_dim))
        context_query = torch.einsum("nhd,hdc->nhc", query, key_weight)
        window = window.to(context_query.dtype)
        scores = context_query @ window.transpose(1, 2)  # (n, heads, slots)
        if present is not None:
            scores = scores.masked_fill(~present[:, None], -torch.inf)
        weights = scores.softmax(dim=-1)
        dropped = self.dropout(weights) if dropout is None else weights * dropout
        mixed = torch.einsum("nhc,hdc->nhd", dropped @ window, value_weight)
        bias = (self.v.bias + 0 * self.k.bias).unflatten(0, (self.num_heads, self.head_dim))
        values = mixed + dropped.sum(dim=-1, keepdim=True) * bias
        return self.norm(embeddings + self.out(values.flatten(1))), weights


class FeedForward(nn.Module):
    """`h + LayerNorm(Linear(GELU(Linear(h))))`."""

    def __init__(self, config: ContextKVConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.norm(self.down(F.gelu(self.up(hidden))))


class ContextKVForCausalLM(PreTrainedModel, GenerationMixin):
    """Frozen token table, recurrent contexts, one attention + feed-forward layer, output tied to the table.

    The output head *is* the table (`hidden @ wte.weight.T`), so there is no second weight to keep tied.
    The table and its norm are never trained; `set_phase` says which of the rest is.
    """

    config_class = ContextKVConfig
    config: ContextKVConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _is_stateful = True  # no assisted decoding: what has been read cannot be unread

    def __init__(self, config: ContextKVConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size)
        self.context_block = ContextBlock(config)
        self.attention = ContextKVAttention(config)
        self.feed_forward = FeedForward(config)
        self.post_init()
        self.set_phase(2)

    def _init_weights(self, module: nn.Module) -> None:
        """Keep what the constructors drew; transformers' own default would redraw every Linear."""

    def set_phase(self, phase: Literal[1, 2]) -> None:
        """Train the ContextBlock (1) or attention and feed-forward (2), and nothing else."""
        self.requires_grad_(False)
        self.context_block.requires_grad_(phase == 1)
        self.attention.requires_grad_(phase == 2)
        self.feed_forward.requires_grad_(phase == 2)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is tied; transformers calls this last when loading, after making everything trainable."""
        super().tie_weights(*args, **kwargs)
        self.set_phase(2)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def load_table(self, table: Tensor) -> None:
        """Put the frozen token table, float32 `[vocab_size, hidden_size]`, in place."""
        with torch.no_grad():
            self.wte.weight.copy_(table)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Normed token embeddings of ids of any shape: `[..., hidden_size]`."""
        return self.embedding_norm(self.wte(input_ids))

    def attend(
        self, embeddings: Tensor, window: Tensor, present: Tensor, dropout: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention and feed-forward of n positions.

        Args:
            embeddings: normed token embeddings `[n, hidden_size]`.
            window: contexts each position sees, `[n, max_contexts, context_dim]`, zero where there is none.
            present: bool `[n, max_contexts]`, the slots that hold a context. With `kv_method="fixed"` the
                others are attended as zeros; with "variable" they are masked.
            dropout: as in `ContextKVAttention.forward`.

        Returns:
            hidden `[n, hidden_size]` and attention weights `[n, num_heads, max_contexts]`.
        """
        mask = present if self.config.kv_method == "variable" else None
        hidden, weights = self.attention(embeddings, window, mask, dropout)
        return self.feed_forward(hidden), weights

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden_size]` to `[..., vocab_size]`."""
        return F.linear(hidden, self.wte.weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: ContextCache | None = None,
        past_key_values: ContextCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read on from `cache`, or from the beginning.

        Args:
            input_ids: int64 `[batch, length]`, the new tokens only.
            attention_mask: `[batch, >= length]`; columns of 0 among the last `length` are padding, which is
                not read: it moves no position and changes no context.
            labels: int64 `[batch, length]`, usually `input_ids`; shifted inside, -100 is ignored.
            cache: taken up and updated in place; `past_key_values` is its name before transformers 5.24.
            use_cache: return the cache; by default as the configuration says, and not with labels.
            logits_to_keep: only the last so many columns' logits, 0 keeps all; or which columns, int64 `[n]`.
            output_attentions: return the attention weights, `[batch, num_heads, length, max_contexts]`.
            return_dict: False returns what there is as a tuple.

        Returns:
            logits `[batch, kept, vocab_size]`; with labels, the mean loss in nats.

        Raises:
            ValueError: nothing to read, or a mask of another shape.
        """
        batch, length = _checked_shape(input_ids, attention_mask)
        cache = past_key_values if cache is None else cache
        embeddings = self.embed(input_ids)
        if cache is None:
            cache = ContextCache(self.config, batch, embeddings)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        read = attention_mask[:, -length:].bool()
        contexts = self._read(cache.state, self.context_block.project_tokens(embeddings), read)
        hidden, weights = self._attend_columns(embeddings, *cache.extend(contexts, read))
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        loss = None
        if labels is not None:
            logits = self.logits(hidden)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_options)
            logits = logits[:, kept]
        else:
            logits = self.logits(hidden[:, kept])
        keep = self.config.use_cache and labels is None if use_cache is None else use_cache
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        if keep:
            output[CACHE_NAME] = cache
        if self.config.output_attentions if output_attentions is None else output_attentions:
            output["attentions"] = (weights,)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _read(self, state: Tensor, token_half: Tensor, read: Tensor) -> Tensor:
        """Contexts `[batch, length, context_dim]` after each column, one by one from `state`."""
        contexts = []
        for half, is_read in zip(token_half.unbind(1), read.unbind(1), strict=True):
            state = torch.where(is_read[:, None], self.context_block(state, half), state)
            contexts.append(state)
        return torch.stack(contexts, dim=1)

    def _attend_columns(
        self, embeddings: Tensor, memory: Tensor, rows: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`attend` for a batch, some columns at a time so that the windows never stand side by side."""
        batch = torch.arange(len(memory), device=memory.device)[:, None, None]
        columns = max(1, ATTENDED_AT_ONCE // len(memory))
        hidden, weights = [], []
        parts = zip(*(x.split(columns, dim=1) for x in (embeddings, rows, present)), strict=True)
        for part, part_rows, part_present in parts:
            window = memory[batch, part_rows].flatten(0, 1)
            attended, attention = self.attend(part.flatten(0, 1), window, part_present.flatten(0, 1))
            hidden.append(attended.unflatten(0, part.shape[:2]))
            weights.append(attention.unflatten(0, part.shape[:2]).transpose(1, 2))
        return torch.cat(hidden, dim=1), torch.cat(weights, dim=2)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: ContextCache | None = None,
        past_key_values: ContextCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """What `forward` still has to read of `input_ids`."""
        cache = past_key_values if cache is None else cache
        seen = 0 if cache is None else cache.get_seq_length()
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": attention_mask,
            "cache": cache,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "logits_to_keep": 1,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: `forward` makes the cache, whose rows are contexts and not keys and values."""
        return False


def _checked_shape(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[int, int]:
    batch, length = input_ids.shape
    require(input_ids.numel() > 0, "input_ids.shape", (batch, length), "one row and one token or more")
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        fits = len(shape) == 2 and shape[0] == batch and shape[1] >= length
        require(fits, "attention_mask.shape", shape, f"({batch}, {length} or more)")
    return batch, length


def parameter_counts(model: ContextKVForCausalLM) -> dict[str, int]:
    """All parameters, and those that Phase 2 trains, of a model that is set to it."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "total": sum(size for size, _ in sizes),
        "trainable_phase2": sum(size for size, is_trained in sizes if is_trained),
    }


ContextKVConfig.register_for_auto_class()
ContextKVForCausalLM.register_for_auto_class("AutoModelForCausalLM")
AutoConfig.register(ContextKVConfig.model_type, ContextKVConfig)
AutoModelForCausalLM.register(ContextKVConfig, ContextKVForCausalLM)
