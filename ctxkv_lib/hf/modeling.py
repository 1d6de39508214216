"""The Context-KV language model, as a transformers model."""

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

# All files of a saved model are imported here: transformers 4 copies only these when it loads one.
from ..method.config import ModelConfig as ModelConfig
from ..method.contexts import SEGMENT
from ..method.copying import Copies, copying_of, mix, mix_losses
from ..method.losses import add_to_logit as add_to_logit
from ..method.model import ContextKV, project_inputs
from ..method.settings import require
from ..method.tuned import SlotAttention as SlotAttention
from ..method.windows import Window as Window
from .arguments import CACHE_NAME, check_arguments, columns_read, following_labels, own_cache
from .cache import ContextCache
from .configuration import ContextKVConfig
from .export import write_code
from .plugins import NAMED as NAMED
from .plugins import parts_of
from .prefill import scan_rows

LONG = 4 * SEGMENT  # columns from which segments are used: as fast there, and faster beyond
TOLERANCE = 1e-5  # largest error of a component of the contexts of long texts
ATTENDED_AT_ONCE = 2048  # positions whose windows are gathered at a time, to bound their memory
# Of a random table. The hidden state is near the current token's embedding: with a larger norm, an untrained
# model would predict the current token again.
ROW_NORM = 0.2
GENERATED = ("attention_mask", "use_cache", "output_attentions", "output_hidden_states", "position_ids")


class ContextKVForCausalLM(ContextKV, PreTrainedModel, GenerationMixin):
    """`ContextKV` with transformers' forward pass, generation, loading and saving.

    The output head *is* the table, so there is no second weight to keep tied.
    """

    config_class = ContextKVConfig
    config: ContextKVConfig
    _is_stateful = True  # no assisted decoding, since contexts cannot be reverted

    def __init__(self, config: ContextKVConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.build(config.shapes(), config.vocab_size, config.has_unigram, parts_of(config.plugins))
        self.post_init()
        self.set_phase(2)

    @classmethod
    def from_model(cls, model: ContextKV, plugins: dict[str, Any]) -> "ContextKVForCausalLM":
        """Wrap a trained model, with `plugins` of `ContextKVConfig`; its tensors are shared."""
        config = ContextKVConfig(
            **vars(model.config),
            vocab_size=model.wte.num_embeddings,
            has_unigram=model.log_unigram is not None,
            plugins=plugins,
        )
        names = [plugin["plugin"] for plugin in plugins.values()]
        is_ours = all(name.startswith("ctxkv_lib.") for name in names)
        with torch.device("meta" if is_ours else "cpu"):  # code of a user may compute with its weights
            wrapped = cls(config)
        wrapped.load_state_dict(model.state_dict(), assign=True)
        for name, buffer in model.named_buffers():  # those that a state has not
            parent, _, leaf = name.rpartition(".")
            setattr(wrapped.get_submodule(parent), leaf, buffer)
        wrapped.set_phase(2)
        return wrapped.eval()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Initialise the table with a small embedding norm, so that the first loss is near ln V.

        All else keeps the init of its constructor; transformers' default would redraw every Linear.
        """
        if module is self.wte:
            torch.nn.init.normal_(module.weight, std=ROW_NORM * module.embedding_dim**-0.5)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the model; a ContextBlock that is frozen now stays in that of evaluation."""
        super().train(mode)
        if not any(weight.requires_grad for weight in self.context_block.parameters()):
            self.context_block.eval()
        return self

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie nothing; transformers calls this last when loading, after making everything trainable."""
        super().tie_weights(*args, **kwargs)
        self.set_phase(2)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **options: Any
    ) -> Any:
        """Load as transformers does; raises ValueError if the weights are not those of this code."""
        found: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **options
        )
        resized = (key if isinstance(key, str) else key[0] for key in found[1]["mismatched_keys"])
        other = {*found[1]["missing_keys"], *found[1]["unexpected_keys"], *resized}
        allowed = "those that this code has; load it with its own code (trust_remote_code=True)"
        require(not other, f"a weight of {pretrained_model_name_or_path}", min(other, default=""), allowed)
        return found if output_loading_info else found[0]

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:  # type: ignore[override]
        """Save as transformers does, with the model's code beside its weights.

        Raises:
            ValueError: a part of the model is defined where its code cannot be exported.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.config.auto_map = write_code(Path(save_directory), self.config.plugins)  # first, or no weights
        super().save_pretrained(str(save_directory), **options)  # transformers 4 splits it to push

    def _get_files_timestamps(self, working_dir: Any) -> dict[str, float]:
        """Return when files were changed, but for this code, which is written before and must be uploaded."""
        found: dict[str, float] = super()._get_files_timestamps(working_dir)
        suffix = self.config.auto_map["AutoConfig"].partition(".")[0].removeprefix("configuration")
        return {name: time for name, time in found.items() if not name.endswith(f"{suffix}.py")}

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.wte

    def resize_token_embeddings(  # type: ignore[override]
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
    ) -> torch.nn.Embedding:
        """Return the table, which keeps its size; raises ValueError if another is asked for."""
        rows = self.wte.num_embeddings
        asked = (new_num_tokens or rows) + -(new_num_tokens or rows) % (pad_to_multiple_of or 1)
        allowed = f"{rows}, since the token table is frozen and tied to the output"
        require(asked == rows, "the number of tokens asked for", asked, allowed)
        return self.wte

    @can_return_tuple
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
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Read on from `cache`, or from the beginning of a text.

        Args:
            input_ids: int64 `[batch, length]`, the new tokens only.
            attention_mask: `[batch, >= length]`; columns of 0 among the last `length` are padding, which is
                not read: it moves no position and changes no context. Columns before them are the cache's.
            labels: int64 `[batch, length]`, usually `input_ids`; shifted inside, -100 is ignored.
            cache: taken up and updated in place; `past_key_values` is its name before transformers 5.24. An
                empty cache of transformers counts as None, and stays empty.
            use_cache: return the cache; by default as the configuration says, and not with labels.
            logits_to_keep: only the last so many columns' logits, 0 keeps all; or which columns, int64 `[n]`,
                which may be none. By default all; but none in training with labels, where only the loss is
                used and its way is not through them.
            output_attentions: return the attention weights, `[batch, num_heads, length, max_contexts]`, if
                the model's attention returns any.
            output_hidden_states: return embeddings and last hidden state, `[batch, length, hidden_size]`.
            options: as transformers' causal losses take them: `num_items_in_batch`, `ignore_index`,
                `shift_labels`; and `position_ids`, `token_type_ids`, `cache_position` that change nothing.

        Returns:
            logits `[batch, kept, vocab_size]`; with labels, the mean loss in nats. Training does not copy.

        Raises:
            ValueError: nothing to read, an argument of another shape, or one that contradicts the others.
        """
        check_arguments(input_ids, options)
        rows = self.wte.num_embeddings
        following = None if labels is None else following_labels(input_ids, labels, rows, **options)
        cache, copying = own_cache(past_key_values if cache is None else cache), copying_of(self)
        distinct, tokens = _distinct(input_ids)
        embeddings = self.embed(distinct)
        if cache is None:
            shape = self.config.context_dim, len(input_ids)
            cache = ContextCache(self.window, *shape, embeddings, keep_tokens=copying is not None)
        has_tokens = copying is None or cache.tokens is not None
        require(has_tokens, CACHE_NAME, "without tokens", "one of a model that copies")
        read = columns_read(input_ids, attention_mask, options.get("position_ids"), cache)
        with torch.autocast(embeddings.device.type, enabled=False):  # else roundings of contexts add up
            inputs = project_inputs(self.context_block, embeddings.to(self.wte.weight.dtype))
            contexts = self._contexts(cache.state, inputs, tokens, read)
        memory, *windows, recent = cache.extend(contexts, read, input_ids)
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-(logits_to_keep or 0), None)
        everywhere = attentions or states or labels is not None  # else only where logits are kept
        columns = slice(None) if everywhere else kept
        attended = (x[:, columns] for x in (tokens, *windows))
        hidden, weights = self._attend_columns(embeddings, memory, *attended)
        copied = None
        if copying is not None and recent is not None and not self.training:
            some = recent._replace(rows=recent.rows[:, columns], before=recent.before[:, columns])
            copied = copying.copies(some, self.window.offsets[-1])
        loss = None if following is None else self._loss(hidden, input_ids, following, copied, **options)
        output = CausalLMOutputWithPast(loss=loss)
        if not self.training or labels is None or logits_to_keep is not None:
            asked = (slice(None), kept if everywhere else slice(None))
            logits = self.logits(hidden[asked], input_ids[:, kept])
            output["logits"] = logits if copied is None else mix(logits, copied.at(asked))
        if self.config.use_cache and labels is None if use_cache is None else use_cache:
            output[CACHE_NAME] = cache
        if states:
            output["hidden_states"] = (embeddings[tokens], hidden)
        if attentions and weights is not None:
            output["attentions"] = (weights,)
        return output

    def _contexts(self, state: Tensor, inputs: Tensor, tokens: Tensor, read: Tensor) -> Tensor:
        """Compute contexts `[batch, length, context_dim]` after each column, from `state`.

        They are computed one by one if a gradient is needed.
        """
        through = (state, inputs, *self.context_block.parameters())
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in through)
        if tokens.shape[1] >= LONG and not trained:
            return scan_rows(self.context_block, inputs, tokens, read, state, TOLERANCE)
        contexts = []
        for token, is_read in zip(inputs[tokens].unbind(1), read.unbind(1), strict=True):
            state = torch.where(is_read[:, None], self.context_block(state, token), state)
            contexts.append(state)
        return torch.stack(contexts, dim=1)

    def _attend_columns(
        self, embeddings: Tensor, memory: Tensor, tokens: Tensor, rows: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Attend for a batch, some columns at a time, so that not all windows are in memory at once."""
        batch = torch.arange(len(memory), device=memory.device)[:, None, None]
        columns = max(1, ATTENDED_AT_ONCE // len(memory))
        hidden, weights = [], []
        for x, slots, real in zip(*(x.split(columns, dim=1) for x in (tokens, rows, present)), strict=True):
            window = memory[batch, slots].flatten(0, 1)
            attended, attention = self.attend(embeddings[x.flatten()], window, real.flatten(0, 1))
            hidden.append(attended.unflatten(0, x.shape))
            if attention is not None:
                weights.append(attention.unflatten(0, x.shape).transpose(1, 2))
        return torch.cat(hidden, dim=1), torch.cat(weights, dim=2) if weights else None

    def _loss(
        self,
        hidden: Tensor,
        read: Tensor,
        following: Tensor,
        copies: Copies | None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        **_: Any,
    ) -> Tensor:
        """Compute the mean loss in nats of each column's prediction of the next label, as transformers does.

        Logits are made in full only if the table is trained, which here it never is.
        """
        table, counted = self.wte.weight, following != ignore_index
        hidden, read, targets = hidden[counted], read[counted], following[counted]
        if table.requires_grad and torch.is_grad_enabled():
            losses = F.cross_entropy(self.logits(hidden, read).float(), targets, reduction="none")
        else:
            losses = self.losses(hidden, read, targets)[0]
        losses = losses if copies is None else mix_losses(losses, targets, copies.at(counted))
        return losses.sum() / (len(targets) if num_items_in_batch is None else num_items_in_batch)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: ContextCache | None = None,
        past_key_values: ContextCache | None = None,
        **kwargs: Any,  # the name with which `generate` accepts the arguments of `forward`
    ) -> dict[str, Any]:
        """Return the unread part of `input_ids` for `forward`; raises ValueError if there is none."""
        cache = own_cache(past_key_values if cache is None else cache)
        kept = {name: kwargs.get(name) for name in GENERATED}
        seen, columns = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
        allowed = f"{seen + 1} or more: the {seen} that the cache has read, and new ones after them"
        require(columns > seen or not seen, "the number of tokens of input_ids", columns, allowed)
        if columns == seen + 1 and not kwargs.get("is_first_iteration"):  # or each token is checked again
            mask = kept["attention_mask"]
            kept |= {"attention_mask": None if mask is None else mask[:, -1:], "position_ids": None}
        return {"input_ids": input_ids[:, seen:], "cache": cache, "logits_to_keep": 1, **kept}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: `forward` makes the cache, which holds contexts instead of keys and values."""
        return False


def _distinct(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids `[any]`, in long texts each once, and `input_ids` as rows of them, int64 of their shape."""
    if input_ids.shape[1] < LONG:  # as a token of generation, where a GPU would wait for the sorting
        every = input_ids.flatten()
        return every, torch.arange(len(every), device=every.device).view_as(input_ids)
    distinct, rows = input_ids.unique(return_inverse=True)
    return distinct, rows


# For the classes named here, the Trainer's label smoothing shifts labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ContextKVConfig.model_type] = ContextKVForCausalLM.__name__
if __name__.startswith("ctxkv_lib."):  # else they would be used for every saved folder
    AutoConfig.register(ContextKVConfig.model_type, ContextKVConfig)
    AutoModelForCausalLM.register(ContextKVConfig, ContextKVForCausalLM)
