"""The Context-KV model for transformers; `save_pretrained` copies this file and the files it imports."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .block import project_inputs
from .config import GPT2_VOCAB_SIZE, ModelConfig
from .copying import mix
from .fields import require
from .model import ContextKV
from .own_code import save_part
from .tuned import SlotLayer, StructuredBlock

# Name of the argument and of the output that hold the cache; transformers 5.24 renamed both.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
IGNORED = -100  # the label of a token that does not count, as in transformers
ATTENDED_AT_ONCE = 2048  # positions per chunk when windows are gathered, to limit memory
SHAPES = [field.name for field in dataclasses.fields(ModelConfig)]
# Classes that may replace the published block or layer. A saved model adds a user's own class here.
PARTS: dict[str, Any] = {"StructuredBlock": StructuredBlock, "SlotLayer": SlotLayer}


class ContextKVConfig(PretrainedConfig):
    """The fields of `ModelConfig`, and everything else that the model is built from.

    `has_unigram` says whether log-frequencies are added to the logits. `parts` says which classes in `PARTS`
    replace the published block or layer: `{"block": {"name": ..., "settings": {...}}, ...}`. Raises
    ValueError for a shape that is not allowed.
    """

    model_type = "context_kv"
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012 (transformers' own form)
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = GPT2_VOCAB_SIZE,
        has_unigram: bool = False,
        parts: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self.vocab_size, self.has_unigram, self.parts = vocab_size, has_unigram, dict(parts or {})
        self.__dict__.update({name: options.pop(name, getattr(ModelConfig, name)) for name in SHAPES})
        self.num_hidden_layers, self.use_cache = 1, options.pop("use_cache", True)
        self.shapes()  # raises if a shape is wrong
        super().__init__(**options)

    def shapes(self) -> ModelConfig:
        return ModelConfig(**{name: getattr(self, name) for name in SHAPES})

    def build(self) -> ContextKV:
        """Build the model with random weights."""
        parts = {kind: PARTS[part["name"]] for kind, part in self.parts.items()}
        for kind, part in parts.items():
            if settings := getattr(part, "Settings", None):  # missing in some users' classes
                parts[kind] = partial(part, settings=settings(**self.parts[kind]["settings"]))
        return ContextKV(self.shapes(), self.vocab_size, self.has_unigram, **parts)


class Past(NamedTuple):
    """The last m contexts of each text, without gaps for padding, and the rows of the new columns."""

    contexts: Tensor  # `[batch, m, context_dim]`; rows before the start of a text are zero
    tokens: Tensor  # the token of each row, int64 `[batch, m]`
    rows: Tensor  # the row of each new column, int64 `[batch, length]`; arbitrary for padding
    first: Tensor  # the first row of each text, int64 `[batch]`


class ContextCache(Cache):
    """The key-value cache for generation: all contexts that a window can reach. Its size is constant."""

    # If this were True, `generate` would crop the cache when it detects the end of a text one step late.
    is_croppable = False

    def __init__(self, model: ContextKV, batch: int) -> None:
        super().__init__(layers=[])
        shape, like = (batch, model.window.offsets[-1] + 1), model.wte.weight  # (batch, reach + 1)
        self.contexts = like.new_zeros(*shape, model.config.context_dim)  # newest context last
        self.tokens = like.new_zeros(shape, dtype=torch.int64)  # the token of each context
        self.lengths = torch.zeros_like(self.tokens[:, 0])  # tokens read per text, without padding
        self.columns = 0  # columns read, including padding

    def extend(self, contexts: Tensor, tokens: Tensor, is_read: Tensor) -> Past:
        """Append new columns and return all rows, with each text's last context in the last row.

        A slot is found by counting rows back, so padding must not leave gaps. Empty rows (padding, or rows
        before the text) move to the front by a stable sort, which keeps the other rows in order. Before and
        after this call, text i occupies the last `lengths[i]` rows.

        `contexts`, `[batch, length, context_dim]`, are the contexts after each column; `is_read` is False at
        padding.
        """
        capacity, length = self.contexts.shape[1], tokens.shape[1]
        is_filled = torch.arange(capacity, device=tokens.device) >= capacity - self.lengths[:, None]
        order = torch.cat([is_filled, is_read], dim=1).to(torch.int8).argsort(dim=1, stable=True)
        contexts = torch.cat([self.contexts, contexts * is_read[..., None]], dim=1)
        contexts = contexts.gather(1, order[..., None].expand_as(contexts))
        tokens = torch.cat([self.tokens, tokens], dim=1).gather(1, order)
        self.contexts, self.tokens = contexts[:, -capacity:], tokens[:, -capacity:]
        self.lengths, self.columns = self.lengths + is_read.sum(dim=1), self.columns + length
        first = (capacity + length - self.lengths).clamp(min=0)
        row_of_column = order.argsort(dim=1)[:, capacity:]
        return Past(contexts, tokens, row_of_column, first)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    get_max_length = get_max_cache_shape

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_tensors(lambda rows: rows[indices.to(rows.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_tensors(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        self._change_tensors(torch.zeros_like)
        self.columns = 0

    def crop(self, *_: Any) -> None:
        raise NotImplementedError("A ContextCache cannot be cropped; start again from an empty cache.")

    def _change_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("contexts", "tokens", "lengths"):
            setattr(self, name, change(getattr(self, name)))


class ContextKVForCausalLM(PreTrainedModel, GenerationMixin):
    """`ContextKV` with transformers' forward pass, generation, loading and saving."""

    config_class = ContextKVConfig
    config: ContextKVConfig
    _is_stateful = True  # disables assisted decoding, which crops the cache
    _no_split_modules = ["ContextKV"]  # noqa: RUF012 (`device_map="auto"` leaves it whole)

    def __init__(self, config: ContextKVConfig, model: ContextKV | None = None) -> None:
        """Wrap a trained `model` and share its tensors, or build a new model if `model` is None."""
        super().__init__(config)
        self.model = config.build() if model is None else model
        self.post_init()
        self.model.set_phase(2)

    @classmethod
    def of(cls, model: ContextKV, settings: Mapping[str, Mapping[str, Any]] | None = None) -> Self:
        """Wrap a trained model; `settings` maps "block" and "layer" to the settings of replaced parts."""
        parts = {
            kind: {"name": type(model.part(kind)).__name__, "settings": dict(part_settings)}
            for kind, part_settings in (settings or {}).items()
        }
        has_unigram, shapes = model.log_unigram is not None, vars(model.config)
        return cls(ContextKVConfig(model.wte.num_embeddings, has_unigram, parts, **shapes), model).eval()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the weights from the constructors; transformers would initialize every Linear again."""

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, but keep a frozen block in evaluation mode."""
        super().train(mode)
        block = self.model.context_block
        # A block is trained only if an adapter has added trainable weights to it.
        block.train(mode and any(weight.requires_grad for weight in block.parameters()))
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:  # type: ignore[override]
        """Load a model as transformers does, and freeze the token table and the block.

        Raises ValueError if the weights do not fit this code, or if the model is on several devices.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, info = loaded
        other = [name for kind in ("missing", "unexpected", "mismatched") for name in info[f"{kind}_keys"]]
        if other:
            raise ValueError(
                f"The weights do not fit this code: {min(map(str, other))} differs; load a folder from "
                "another version with trust_remote_code=True and its own code, or train again."
            )
        # Weights that are offloaded to disk are on the device "meta".
        devices = {str(weight.device) for weight in model.parameters()}
        require(len(devices) == 1 and "meta" not in devices, "device_map", devices, "all on one device")
        # If an adapter is loaded, PEFT has already frozen all other weights.
        if not getattr(model, "_hf_peft_config_loaded", False):
            for part in (model.model.wte, model.model.embedding_norm, model.model.context_block):
                part.requires_grad_(False)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:  # type: ignore[override]
        """Save as transformers does, with the files of a user's own classes; see `save_part` for errors."""
        lost = dict(self.named_buffers()).keys() - self.state_dict().keys()
        require(not lost, "a buffer", min(lost, default=""), "those saved with the weights (persistent=True)")
        super().save_pretrained(save_directory, **options)
        for part in (type(self.model.part(kind)) for kind in self.config.parts):
            if PARTS.get(part.__name__) is not part:
                save_part(part, Path(save_directory) / "modeling.py")

    def get_input_embeddings(self) -> nn.Module:
        return self.model.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table; each new token gets the mean of `log_unigram` as its log-frequency."""
        table: Any = value
        self.model.wte, unigram = table, self.model.log_unigram
        if unigram is not None:
            more = table.num_embeddings - len(unigram)  # if negative, `pad` cuts the end
            self.model.log_unigram = F.pad(unigram, (0, more), value=unigram.mean().item())

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: ContextCache | None = None,
        past_key_values: ContextCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Read new tokens, continuing from `cache` if given, and predict the tokens that follow.

        Args:
            input_ids: int64 `[batch, length]`, the new tokens only.
            attention_mask: `[batch, >= length]`; zeros in the last `length` columns mark padding. Padding
                is not read: it shifts no positions and changes no context.
            position_ids: must grow by 1 per token of a text, since packed texts are not supported.
            labels: int64 `[batch, length]`, usually `input_ids`. They are shifted here; -100 is ignored.
            shift_labels, num_items_in_batch: as in transformers' losses. The number of items divides the loss
                instead of the number of labels.
            cache: updated in place; `past_key_values` is its name before transformers 5.24.
            use_cache: whether to return the cache. With labels, the default is False, otherwise the
                configuration's value.
            logits_to_keep: the columns that get logits: their indices, int64 `[kept]`, or a number of last
                columns (0 means all columns). With labels, the argument is ignored.
            output_hidden_states: whether to return the embeddings and the states that the output head reads.
                Both have gradients. Gradients through the contexts cost time and memory. The default is the
                configuration's value.
            output_attentions: whether to return attention weights `[batch, heads, length, slots]`; the
                default is the configuration's value.
            options: have no effect.

        Returns:
            Logits `[batch, kept, vocab_size]` and, with labels, the mean loss in nats. Copying is off in
            training.

        Raises:
            ValueError: Texts are packed, the cache is from another model or batch, or attention weights are
                asked for that the layer does not return.
        """
        config = self.config
        shows_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        shows_weights = config.output_attentions if output_attentions is None else output_attentions
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_read = mask[:, -input_ids.shape[1] :].bool()
        targets = shift_labels
        if targets is None and labels is not None:
            targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        cache = self._cache_to_extend(len(input_ids), past_key_values if cache is None else cache)
        if position_ids is not None and not cache.columns:
            _refuse_packed(position_ids, is_read)
        embeddings = self.model.embed(input_ids)
        if shows_states and torch.is_grad_enabled():
            embeddings.requires_grad_()
        past = self._read(embeddings, input_ids, is_read, cache)
        last = 0 if targets is not None else logits_to_keep
        kept = last if isinstance(last, Tensor) else slice(-last or None, None)
        tokens, at_kept = input_ids[:, kept], past._replace(rows=past.rows[:, kept])
        if shows_states or shows_weights:
            states, weights = self._attend(embeddings, past)
            hidden = states[:, kept]
        else:
            hidden, _ = self._attend(embeddings[:, kept], at_kept)

        logits, output = self._logits(hidden, tokens, at_kept), CausalLMOutputWithPast()
        if targets is not None:
            flat = logits.flatten(0, 1).float(), targets.flatten()
            total = F.cross_entropy(*flat, reduction="sum", ignore_index=IGNORED)
            count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            output["loss"] = total / count
        output["logits"] = logits
        if shows_states:
            output["hidden_states"] = (embeddings, states)
        if shows_weights:
            allowed = "False, as this layer returns none"
            require(weights is not None, "output_attentions", True, allowed)
            output["attentions"] = (weights,)
        if (config.use_cache and targets is None) if use_cache is None else use_cache:
            output[CACHE_NAME] = cache
        return output

    def _cache_to_extend(self, batch: int, cache: Cache | None) -> ContextCache:
        """Return `cache`, or a new cache if `cache` is None or is an empty cache of a different class."""
        if isinstance(cache, ContextCache):
            require(len(cache.lengths) == batch, f"texts in {CACHE_NAME}", len(cache.lengths), f"{batch}")
            return cache
        allowed = "None, or the ContextCache that this model returned"
        require(cache is None or not cache.get_seq_length(), CACHE_NAME, type(cache).__name__, allowed)
        return ContextCache(self.model, batch)

    def _read(self, embeddings: Tensor, input_ids: Tensor, is_read: Tensor, cache: ContextCache) -> Past:
        """Compute each column's context from the context before it, and append the contexts to the cache."""
        contexts, context, block = [], cache.contexts[:, -1], self.model.context_block
        with torch.autocast(embeddings.device.type, enabled=False):  # rounding errors would accumulate
            inputs = project_inputs(block, embeddings.to(context.dtype))
            for column, is_token in zip(inputs.unbind(1), is_read.unbind(1), strict=True):
                context = torch.where(is_token[:, None], block(context, column), context)
                contexts.append(context)
        return cache.extend(torch.stack(contexts, dim=1), input_ids, is_read)

    def _attend(self, x: Tensor, past: Past) -> tuple[Tensor, Tensor | None]:
        """Compute hidden states `[batch, n, hidden_size]`, and weights `[batch, heads, n, slots]` or None.

        `x` are the embeddings at the rows of `past`. Windows are gathered in chunks to limit memory.
        """
        text, size = torch.arange(len(x), device=x.device)[:, None, None], max(1, ATTENDED_AT_ONCE // len(x))
        states, all_weights = [], []
        for embeddings, rows in zip(x.split(size, dim=1), past.rows.split(size, dim=1), strict=True):
            slots = self.model.window.slots(rows)
            present = slots >= past.first[:, None, None]
            present[..., 0] = True  # even padding needs one slot; otherwise attention is NaN
            window = past.contexts[text, slots.clamp(min=0)]
            hidden, weights = self.model.apply_layer(
                *(part.flatten(0, 1) for part in (embeddings, window, present))
            )
            states.append(hidden.unflatten(0, rows.shape))
            if weights is not None:
                all_weights.append(weights.unflatten(0, rows.shape).transpose(1, 2))
        return torch.cat(states, dim=1), torch.cat(all_weights, dim=2) if all_weights else None

    def _logits(self, hidden: Tensor, tokens: Tensor, past: Past) -> Tensor:
        """Compute logits `[batch, n, vocab_size]` from the hidden states at the rows of `past`."""
        hidden = hidden.to(self.model.wte.weight.dtype)  # autocast may change the dtype
        logits, copying = self.model.logits(hidden, tokens), self.model.copying
        if copying is None or self.training:
            return logits
        reach, rows = self.model.window.offsets[-1], past.rows
        some = rows.split(max(1, ATTENDED_AT_ONCE // len(rows)), dim=1)
        shares = [copying.shares(past.contexts, part, past.first, reach) for part in some]
        text = torch.arange(len(rows), device=rows.device)[:, None, None]
        followed = (rows[..., None] - torch.arange(reach, device=rows.device)).clamp(min=0)
        return mix(logits, past.tokens[text, followed], torch.cat(shares, dim=1))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: ContextCache | None = None,
        past_key_values: ContextCache | None = None,
        next_sequence_length: int | None = None,  # not used; `cache.columns` replaces it
        **kwargs: Any,  # `generate` requires this name
    ) -> dict[str, Any]:
        """Return the arguments of `forward`, with only those `input_ids` that are not in the cache yet."""
        cache = past_key_values if cache is None else cache
        unread = input_ids[:, 0 if cache is None else cache.get_seq_length() :]
        return dict(super().prepare_inputs_for_generation(unread, **{CACHE_NAME: cache}, **kwargs))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes a `ContextCache` instead


def _refuse_packed(position_ids: Tensor, is_read: Tensor) -> None:
    """Raise ValueError if positions do not grow by 1 per token, as if one row had several texts."""
    moved = bool(((position_ids != is_read.cumsum(dim=1) - 1) & is_read).any())
    allowed = "positions that grow by 1 per token; packed texts must be separate rows"
    require(not moved, "position_ids", "restarted", allowed)


ContextKVConfig.register_for_auto_class()
ContextKVForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# The Trainer's label smoothing shifts labels only for classes that are registered here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ContextKVConfig.model_type] = ContextKVForCausalLM.__name__
