"""The Context-KV language model, as a transformers model."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# Named for transformers 4, as is the last one: loading a saved model, it takes along only the files that this
# one names.
from ..method.config import ModelConfig as ModelConfig
from ..method.losses import add_to_own, frozen_head_cross_entropy
from ..method.model import NOT_DRAWN, ContextBlock, ContextKVAttention, Dropout, Dropped, FeedForward
from ..method.scan import SEGMENT, scan_rows
from ..method.settings import require
from ..method.windows import slot_positions as slot_positions
from .cache import ContextCache
from .configuration import ContextKVConfig
from .export import AUTO_MAP, write_code

LONG = (
    4 * SEGMENT
)  # columns from which they are read in lock-step: there as fast, and sooner the more they are
TOLERANCE = 1e-5  # of a component of the contexts of long texts, see `segmented_scan`
ATTENDED_AT_ONCE = 2048  # positions whose windows are gathered at a time, to bound their memory
# What transformers 5.24 renamed.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class ContextKVForCausalLM(PreTrainedModel, GenerationMixin):
    """Frozen token table, recurrent contexts, one attention + feed-forward layer, output tied to the table.

    The output head *is* the table (`hidden @ wte.weight.T`), so there is no second weight to keep tied.
    The table and its norm are never trained; `set_phase` says which of the rest is.

    Attributes:
        log_unigram: what is added to the logits, float32 `[vocab_size]`; None without.
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
        self.register_buffer("log_unigram", torch.zeros(config.vocab_size) if config.has_unigram else None)
        self.dropout = Dropped(config.input_dropout)
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

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """As transformers does, with the model's code beside its weights."""
        self.config.auto_map = AUTO_MAP
        super().save_pretrained(save_directory, **options)
        write_code(Path(save_directory))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def load_table(self, table: Tensor) -> None:
        """Put the frozen token table, float32 `[vocab_size, hidden_size]`, in place."""
        with torch.no_grad():
            self.wte.weight.copy_(table)

    def load_unigram(self, distribution: Tensor) -> None:
        """Put the frozen distribution of tokens, `[vocab_size]`, each above 0, in place."""
        self.log_unigram = distribution.log().to(self.wte.weight)

    def drawn_dropout(self, count: int) -> Dropout:
        """Factors for a batch of `count` positions, drawn as `attend` draws them."""
        shape, ones = self.config, self.wte.weight.new_ones
        places = (
            (self.dropout, ones(count, shape.hidden_size)),
            (self.attention.dropout, ones(count, shape.num_heads, shape.max_contexts)),
            (self.attention.out_dropout, ones(count, shape.hidden_size)),
            (self.feed_forward.dropout, ones(count, self.feed_forward.up.out_features)),
            (self.feed_forward.dropout, ones(count, shape.hidden_size)),
        )
        return Dropout(*(place(ones) if place.p else None for place, ones in places))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Normed token embeddings of ids of any shape: `[..., hidden_size]`."""
        return self.embedding_norm(self.wte(input_ids))

    def attend(
        self, embeddings: Tensor, window: Tensor, present: Tensor, dropout: Dropout = NOT_DRAWN
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
        embeddings = self.dropout(embeddings, dropout.embeddings)
        hidden, attended, weights = self.attention(embeddings, window, mask, dropout)
        carried = hidden if self.config.output == "residual" else attended
        return carried + self.feed_forward(hidden, dropout), weights

    def logits(self, hidden: Tensor, read: Tensor) -> Tensor:
        """`[..., hidden_size]` to `[..., vocab_size]`; `read` are the tokens just read, integers `[...]`."""
        logits = F.linear(hidden, self.wte.weight, self.log_unigram)
        if self.config.repeat_logit:
            add_to_own(logits, read, self.config.repeat_logit)
        return logits

    def losses(
        self, hidden: Tensor, read: Tensor, targets: Tensor, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses and correctness of `logits`, as `frozen_head_cross_entropy`; `table` in another dtype."""
        table = self.wte.weight if table is None else table
        return frozen_head_cross_entropy(
            hidden, table, targets, self.log_unigram, read, self.config.repeat_logit
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: ContextCache | None = None,
        past_key_values: ContextCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
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
            logits_to_keep: only the last so many columns' logits, 0 keeps all; or which columns, int64 `[n]`,
                which may be none. By default all; but none in training with labels, where only the loss is
                used and its way is not through them.
            output_attentions: return the attention weights, `[batch, num_heads, length, max_contexts]`.
            return_dict: False returns what there is as a tuple.
            loss_options: as transformers' causal losses take them: `num_items_in_batch`, `ignore_index`,
                `shift_labels`.

        Returns:
            logits `[batch, kept, vocab_size]`; with labels, the mean loss in nats.

        Raises:
            ValueError: nothing to read, or a mask of another shape.
        """
        batch, length = _checked_shape(input_ids, attention_mask)
        cache = past_key_values if cache is None else cache
        distinct, tokens = _distinct(input_ids)
        embeddings = self.embed(distinct)
        if cache is None:
            cache = ContextCache(self.config, batch, embeddings)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        read = attention_mask[:, -length:].bool()
        with unrounded(embeddings.device):
            half = self.context_block.project_tokens(embeddings.to(self.wte.weight.dtype))
            contexts = self._contexts(cache.state, half, tokens, read)
        memory, *windows = cache.extend(contexts, read)
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-(logits_to_keep or 0), None)
        everywhere = attentions or labels is not None  # else only where logits are kept
        columns = slice(None) if everywhere else kept
        attended = (x[:, columns] for x in (tokens, *windows))
        hidden, weights = self._attend_columns(embeddings, memory, *attended)
        loss = None if labels is None else self._loss(hidden, input_ids, labels, **loss_options)
        silent = self.training and labels is not None and logits_to_keep is None
        logits = None
        if not silent:
            logits = self.logits(hidden[:, kept] if everywhere else hidden, input_ids[:, kept])
        keep = self.config.use_cache and labels is None if use_cache is None else use_cache
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        if keep:
            output[CACHE_NAME] = cache
        if attentions:
            output["attentions"] = (weights,)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _contexts(self, state: Tensor, token_half: Tensor, tokens: Tensor, read: Tensor) -> Tensor:
        """Contexts `[batch, length, context_dim]` after each column, from `state`.

        Where a gradient has to go through them they are read one by one.
        """
        through = (state, token_half, *self.context_block.parameters())
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in through)
        if trained or tokens.shape[1] < LONG:
            return self._read(state, token_half[tokens], read)
        return scan_rows(self.context_block, token_half, tokens, read, state, TOLERANCE)

    def _read(self, state: Tensor, token_half: Tensor, read: Tensor) -> Tensor:
        """Contexts `[batch, length, context_dim]` after each column, one by one from `state`."""
        contexts = []
        for half, is_read in zip(token_half.unbind(1), read.unbind(1), strict=True):
            state = torch.where(is_read[:, None], self.context_block(state, half), state)
            contexts.append(state)
        return torch.stack(contexts, dim=1)

    def _attend_columns(
        self, embeddings: Tensor, memory: Tensor, tokens: Tensor, rows: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`attend` for a batch, some columns at a time so that the windows never stand side by side."""
        batch = torch.arange(len(memory), device=memory.device)[:, None, None]
        columns = max(1, ATTENDED_AT_ONCE // len(memory))
        hidden, weights = [], []
        parts = zip(*(x.split(columns, dim=1) for x in (tokens, rows, present)), strict=True)
        for part, part_rows, part_present in parts:
            window = memory[batch, part_rows].flatten(0, 1)
            attended, attention = self.attend(embeddings[part.flatten()], window, part_present.flatten(0, 1))
            hidden.append(attended.unflatten(0, part.shape))
            weights.append(attention.unflatten(0, part.shape).transpose(1, 2))
        return torch.cat(hidden, dim=1), torch.cat(weights, dim=2)

    def _loss(
        self,
        hidden: Tensor,
        read: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Mean loss in nats of each column's prediction of the next one's label, as transformers has it.

        Logits are made in full only if the table is trained, which here it never is.
        """
        table = self.wte.weight
        following = F.pad(labels, (0, 1), value=ignore_index)[:, 1:] if shift_labels is None else shift_labels
        counted = following != ignore_index
        hidden, read, targets = hidden[counted], read[counted], following[counted]
        if table.requires_grad and torch.is_grad_enabled():
            losses = F.cross_entropy(self.logits(hidden, read).float(), targets, reduction="none")
        else:
            precise = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            losses = self.losses(precise, read, targets)[0]
        return losses.sum() / (len(targets) if num_items_in_batch is None else num_items_in_batch)

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


def unrounded(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside: contexts are made from contexts, and roundings would add up."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _distinct(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids `[any]`, in long texts each once, and `input_ids` as rows of them, int64 of their shape."""
    if input_ids.shape[1] < LONG:
        every = input_ids.flatten()
        return every, torch.arange(len(every), device=every.device).view_as(input_ids)
    distinct, rows = input_ids.unique(return_inverse=True)
    return distinct, rows


def parameter_counts(model: ContextKVForCausalLM) -> dict[str, int]:
    """All parameters, and those that Phase 2 trains, of a model that is set to it."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "total": sum(size for size, _ in sizes),
        "trainable_phase2": sum(size for size, is_trained in sizes if is_trained),
    }


AutoConfig.register(ContextKVConfig.model_type, ContextKVConfig)
AutoModelForCausalLM.register(ContextKVConfig, ContextKVForCausalLM)
