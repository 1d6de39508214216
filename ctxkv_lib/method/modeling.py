"""The Context-KV language model for transformers; `save_pretrained` copies this file and those it imports."""

import dataclasses
import inspect
import re
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

from .config import GPT2_VOCAB_SIZE, ModelConfig
from .copying import mix
from .fields import require
from .model import ContextKV, Parts, project_inputs
from .tuned import SlotAttention, StructuredBlock

# What transformers 5.24 renamed.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
ATTENDED_AT_ONCE = 2048  # positions whose windows are gathered at a time, to bound their memory
OPTIONS = {"token_type_ids", "cache_position", "num_items_in_batch", "ignore_index", "shift_labels"}
SHAPES = [field.name for field in dataclasses.fields(ModelConfig)]
PLACES = {"block": "context_block", "attention": "attention"}  # in the model, by hook
# Classes that may replace published parts, by name; the saved file of a user's own model adds its own.
PARTS: dict[str, Any] = {"StructuredBlock": StructuredBlock, "SlotAttention": SlotAttention}


class ContextKVConfig(PretrainedConfig):
    """The fields of `ModelConfig`, checked by it (ValueError), and what else the model is built with.

    Attributes:
        vocab_size: tokens of the table.
        has_unigram: whether log-frequencies are added to the logits.
        parts: `{"block": {"name": ..., "settings": {...}}, ...}` of the `PARTS` that replace published ones.
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
        vars(self).update({name: options.pop(name, getattr(ModelConfig, name)) for name in SHAPES})
        self.num_hidden_layers, self.use_cache = 1, options.pop("use_cache", True)
        self.shapes()  # which refuses a wrong one
        super().__init__(**options)

    def shapes(self) -> ModelConfig:
        return ModelConfig(**{name: getattr(self, name) for name in SHAPES})

    def build(self) -> ContextKV:
        """Make the model, with random weights."""
        made = {hook: PARTS[part["name"]] for hook, part in self.parts.items()}
        for hook, kind in made.items():
            if settings := getattr(kind, "Settings", None):
                made[hook] = partial(kind, settings=settings(**self.parts[hook]["settings"]))
        return ContextKV(self.shapes(), self.vocab_size, self.has_unigram, Parts(**made))


class Memory(NamedTuple):
    """The last m contexts of each text without gaps, and where the new columns are among them."""

    contexts: Tensor  # zero before the text, `[batch, m, context_dim]`
    tokens: Tensor  # int64 `[batch, m]`
    rows: Tensor  # that of each new column, int64 `[batch, length]`; of padding, any
    first: Tensor  # the first row of each text, int64 `[batch]`


class ContextCache(Cache):
    """The key-value cache of generation: the contexts that a window can reach, of constant size.

    Attributes:
        contexts: of each text, its last one last, zero before the text, `[batch, reach + 1, context_dim]`.
        tokens: that of each context, int64 `[batch, reach + 1]`.
        lengths: tokens read of each text, int64 `[batch]`; padding is not read.
        columns: of `input_ids` read, padding included.
    """

    is_croppable = False  # else generation, where it checks whether to stop a step late, would crop it

    def __init__(self, model: ContextKV, batch: int) -> None:
        super().__init__(layers=[])
        shape, like = (batch, model.window.offsets[-1] + 1), model.wte.weight
        self.contexts = like.new_zeros(*shape, model.config.context_dim)
        self.tokens = like.new_zeros(shape, dtype=torch.int64)
        self.lengths, self.columns = torch.zeros_like(self.tokens[:, 0]), 0

    def extend(self, contexts: Tensor, tokens: Tensor, read: Tensor) -> Memory:
        """Add new columns, and return them with those held before.

        `contexts` are those after each column, `[batch, length, context_dim]`; `read` is False at padding.
        """
        kept, length = self.contexts.shape[1], tokens.shape[1]
        held = torch.arange(kept, device=tokens.device) >= kept - self.lengths[:, None]
        order = torch.cat([held, read], dim=1).to(torch.int8).argsort(dim=1, stable=True)
        all_tokens = torch.cat([self.tokens, tokens], dim=1).gather(1, order)
        both = torch.cat([self.contexts, contexts * read[..., None]], dim=1)
        both = both.gather(1, order[..., None].expand_as(both))
        self.contexts, self.tokens = both[:, -kept:], all_tokens[:, -kept:]
        self.lengths, self.columns = self.lengths + read.sum(dim=1), self.columns + length
        first = (kept + length - self.lengths).clamp(min=0)
        return Memory(both, all_tokens, order.argsort(dim=1)[:, kept:], first)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """Return -1, which means no limit."""
        return -1

    get_max_length = get_max_cache_shape

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self._each(lambda held: held[indices.to(held.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda held: held.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        self._each(torch.zeros_like)
        self.columns = 0

    def crop(self, *_: Any) -> None:
        raise NotImplementedError("Contexts cannot be unread; start again from an empty cache.")

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("contexts", "tokens", "lengths"):
            setattr(self, name, change(getattr(self, name)))


class ContextKVForCausalLM(PreTrainedModel, GenerationMixin):
    """`ContextKV` with transformers' forward pass, generation, loading and saving."""

    config_class = ContextKVConfig
    config: ContextKVConfig
    _is_stateful = True  # no assisted decoding, since contexts cannot be unread

    def __init__(self, config: ContextKVConfig, model: ContextKV | None = None) -> None:
        """Wrap a trained model, whose tensors are shared, or build one."""
        super().__init__(config)
        self.model = config.build() if model is None else model
        self.post_init()
        self.model.set_phase(2)

    @classmethod
    def of(cls, model: ContextKV, settings: Mapping[str, Mapping[str, Any]] | None = None) -> Self:
        """Wrap a trained model; `settings` are those of its parts, by hook: `block` and `attention`."""
        parts = {
            hook: {"name": type(getattr(model, PLACES[hook])).__name__, "settings": dict(each)}
            for hook, each in (settings or {}).items()
        }
        has_unigram, shapes = model.log_unigram is not None, vars(model.config)
        return cls(ContextKVConfig(model.wte.num_embeddings, has_unigram, parts, **shapes), model).eval()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the init of each layer's constructor; transformers' default would redraw every Linear."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the frozen ContextBlock stays in that of evaluation, as when it made the caches."""
        super().train(mode)
        self.model.context_block.eval()
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:  # type: ignore[override]
        """Load as transformers does, frozen as trained; raises ValueError for the weights of other code."""
        found: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, info = found
        other = [name for kind in ("missing", "unexpected", "mismatched") for name in info[f"{kind}_keys"]]
        if other:
            raise ValueError(
                f"The weights are not those of this code: {min(map(str, other))}; load a folder of another "
                "version with trust_remote_code=True and its own code, or train again."
            )
        model.model.set_phase(2)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:  # type: ignore[override]
        """Save as transformers does, with the files of a user's own parts; raises as `save_part`."""
        lost = dict(self.named_buffers()).keys() - self.state_dict().keys()
        require(not lost, "a buffer", min(lost, default=""), "those saved with the weights (persistent=True)")
        super().save_pretrained(save_directory, **options)
        for kind in (type(getattr(self.model, PLACES[hook])) for hook in self.config.parts):
            if PARTS.get(kind.__name__) is not kind:
                save_part(kind, Path(save_directory) / "modeling.py")

    def get_input_embeddings(self) -> nn.Module:
        return self.model.wte

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: ContextCache | None = None,
        past_key_values: ContextCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Read on from `cache`, or from the beginning of a text.

        Args:
            input_ids: int64 `[batch, length]`, the new tokens only.
            attention_mask: `[batch, >= length]`; columns of 0 among the last `length` are padding, which is
                not read: it moves no position and changes no context.
            labels: int64 `[batch, length]`, usually `input_ids`; shifted inside, -100 is ignored.
            cache: updated in place; `past_key_values` is its name before transformers 5.24.
            use_cache: return the cache; by default as the configuration says, and not with labels.
            logits_to_keep: without labels, only the last so many columns' logits; 0 keeps all.
            options: `num_items_in_batch`, `ignore_index` and `shift_labels` as transformers' losses take them
                (the last with or without `labels`), and some that change nothing.

        Returns:
            logits `[batch, kept, vocab_size]`; with labels, the mean loss in nats. In training with labels
            there are no logits: the loss is computed without them. Training does not copy.

        Raises:
            ValueError: nothing to read, or an argument that does not fit.
        """
        cache = self._own_cache(len(input_ids), past_key_values if cache is None else cache)
        read = _columns_read(input_ids, attention_mask, not cache.columns, **options)
        ignored, shift_labels = options.get("ignore_index", -100), options.get("shift_labels")
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignored)[:, 1:]
        if shift_labels is not None:
            shape, allowed = tuple(shift_labels.shape), tuple(input_ids.shape)
            require(shape == allowed, "labels.shape", shape, f"{allowed}, as input_ids")
        embeddings = self.model.embed(input_ids)
        memory = cache.extend(self._contexts(embeddings, cache.contexts[:, -1], read), input_ids, read)
        kept = slice(-logits_to_keep if logits_to_keep and shift_labels is None else None, None)
        hidden, output = self._hidden(embeddings, memory, kept), CausalLMOutputWithPast()
        if shift_labels is None or not self.training or self.model.wte.weight.requires_grad:
            output["logits"] = self._logits(hidden, input_ids, memory, kept)
        if shift_labels is not None:
            counted, number = shift_labels != ignored, options.get("num_items_in_batch")
            if output.logits is None:  # as long as the table is frozen
                loss = self.model.losses(hidden[counted], input_ids[counted], shift_labels[counted])[0].sum()
            else:
                every = output.logits.flatten(0, 1).float(), shift_labels.flatten()
                loss = F.cross_entropy(*every, reduction="sum", ignore_index=ignored)
            output["loss"] = loss / (counted.sum() if number is None else number)
        if (self.config.use_cache and shift_labels is None) if use_cache is None else use_cache:
            output[CACHE_NAME] = cache
        return output

    def _own_cache(self, batch: int, cache: Cache | None) -> ContextCache:
        """Return the cache to read on from, a new one if there is none or an empty one of another kind."""
        if isinstance(cache, ContextCache):
            return cache
        allowed = "None, or the ContextCache that this model returned"
        require(cache is None or not cache.get_seq_length(), CACHE_NAME, type(cache).__name__, allowed)
        return ContextCache(self.model, batch)

    def _contexts(self, embeddings: Tensor, state: Tensor, read: Tensor) -> Tensor:
        """Compute contexts `[batch, length, context_dim]` after each column, column by column."""
        contexts, block = [], self.model.context_block
        with torch.autocast(embeddings.device.type, enabled=False):  # else roundings of contexts add up
            inputs = project_inputs(block, embeddings.to(state.dtype))
            for column, is_read in zip(inputs.unbind(1), read.unbind(1), strict=True):
                state = torch.where(is_read[:, None], block(state, column), state)
                contexts.append(state)
        return torch.stack(contexts, dim=1)

    def _hidden(self, embeddings: Tensor, memory: Memory, kept: slice) -> Tensor:
        """Compute hidden states of the columns `kept`, `[batch, kept, hidden_size]`, some at a time."""
        batch, found = torch.arange(len(embeddings), device=embeddings.device)[:, None, None], []
        size = max(1, ATTENDED_AT_ONCE // len(embeddings))
        chunks = (each[:, kept].split(size, dim=1) for each in (embeddings, memory.rows))
        for x, rows in zip(*chunks, strict=True):
            slots = self.model.window.slots(rows)
            present = slots >= memory.first[:, None, None]
            present[..., 0] = True  # also of padding: without any slot, attention would be NaN
            window = memory.contexts[batch, slots.clamp(min=0)]
            hidden, _ = self.model.attend(*(each.flatten(0, 1) for each in (x, window, present)))
            found.append(hidden.unflatten(0, rows.shape))
        return torch.cat(found, dim=1)

    def _logits(self, hidden: Tensor, input_ids: Tensor, memory: Memory, kept: slice) -> Tensor:
        """Compute the logits of the columns `kept`, `[batch, kept, vocab_size]`."""
        logits, copying = self.model.logits(hidden, input_ids[:, kept]), self.model.copying
        if copying is None or self.training:
            return logits
        reach, rows = self.model.window.offsets[-1], memory.rows[:, kept]
        some = rows.split(max(1, ATTENDED_AT_ONCE // len(rows)), dim=1)
        shares = [copying.shares(memory.contexts, each, memory.first, reach) for each in some]
        batch = torch.arange(len(rows), device=rows.device)[:, None, None]
        followed = (rows[..., None] - torch.arange(reach, device=rows.device)).clamp(min=0)
        return mix(logits, memory.tokens[batch, followed], torch.cat(shares, dim=1))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: ContextCache | None = None,
        past_key_values: ContextCache | None = None,
        **kwargs: Any,  # the name with which `generate` accepts the arguments of `forward`
    ) -> dict[str, Any]:
        """Return the unread part of `input_ids` for `forward`."""
        cache = past_key_values if cache is None else cache
        seen = 0 if cache is None else cache.get_seq_length()
        kept = {name: kwargs.get(name) for name in ("attention_mask", "use_cache")}
        return {"input_ids": input_ids[:, seen:], CACHE_NAME: cache, "logits_to_keep": 1, **kept}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: `forward` makes the cache, which holds contexts instead of keys and values."""
        return False


def _columns_read(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    is_first: bool,
    position_ids: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Return which columns are no padding, bool `[batch, length]`; raises the ValueErrors of `forward`."""
    shape = tuple(input_ids.shape)
    allowed = "[batch, length], neither of them 0"
    require(len(shape) == 2 and 0 not in shape, "input_ids.shape", shape, allowed)
    given = {name for name, value in options.items() if value is not None and value is not False}
    unknown = sorted(given - OPTIONS)
    require(not unknown, "an argument of forward", unknown, "those that help(model.forward) lists")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    fits = mask.ndim == 2 and len(mask) == shape[0] and mask.shape[1] >= shape[1]
    found = f"{mask.dtype} {tuple(mask.shape)}".removeprefix("torch.")
    allowed = "[batch, length or more], 1 where a column is read, 0 where it is padding"
    require(fits and not mask.is_floating_point(), "attention_mask", found, allowed)
    read = mask[:, -shape[1] :].bool()
    if position_ids is not None and is_first:  # later ones would make a GPU wait at each token
        moved = bool(((position_ids != read.cumsum(dim=1) - 1) & read).any())
        allowed = "one more each token; packed texts must be separate rows"
        require(not moved, "position_ids", "restarted", allowed)
    return read


def save_part(kind: type, modeling: Path) -> None:
    """Add the file of a user's own class to a saved model; it may import files that are saved with it.

    Raises ValueError where the class is not in a module, or its file needs others that are not there.
    """
    name, allowed = kind.__name__, "a class of a module, not of a notebook, script or function"
    is_found = getattr(inspect.getmodule(kind), name, None) is kind and kind.__module__ != "__main__"
    require(is_found, "a part of the model", name, allowed)
    file = Path(inspect.getfile(kind))
    require(not (Path(__file__).parent / file.name).exists(), "the file of a part", file.name, "another name")
    code = re.sub(rf"(?m)^(\s*from ){re.escape(__package__)}\.", r"\1.", file.read_text("utf-8"))
    own = {__package__.partition(".")[0], *(path.stem for path in file.parent.glob("*.py"))}
    for needed in re.findall(r"(?m)^\s*(?:from|import)\s+([.\w]+)", code):
        top, saved = needed.partition(".")[0], modeling.parent / f"{needed[1:]}.py"
        allowed = "an installed package but this one, or a file that is saved with every model"
        require(top not in own if top else saved.exists(), f"an import of {file.name}", needed, allowed)
    (modeling.parent / file.name).write_text(code, "utf-8")
    line = f"from .{file.stem} import {name} as part  # noqa: E402\n\nPARTS[{name!r}] = part\n"
    modeling.write_text(modeling.read_text("utf-8") + line, "utf-8")


ContextKVConfig.register_for_auto_class()
ContextKVForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# For the classes named here, the Trainer's label smoothing shifts labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ContextKVConfig.model_type] = ContextKVForCausalLM.__name__
