"""The models of `model.memory`: contexts have the Hugging Face model, a baseline a variant of it."""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..hf.configuration import ContextKVConfig
from ..hf.modeling import ContextKVForCausalLM, unrounded
from ..method.caches import StreamCache
from ..method.config import FROZEN_BLOCK, WITH_BLOCK, ModelConfig
from ..method.model import NOT_DRAWN, ContextKVAttention, Dropout, FeedForward
from ..method.windows import slot_positions
from .memories import CausalAttention, GatedRecurrence, NoMemory, TokenBlock, own_rows
from .rows import RowBatch, TokenRows

SEGMENT = 32  # tokens that the gradient of an end-to-end ContextBlock goes back at most
TRAINED_BURN_IN = 128  # tokens that a recurrence reads, in training, before those that matter


class BaselineConfig(ContextKVConfig):
    """Under a name of its own, so that nothing loads a baseline as a Context-KV model."""

    model_type = "context_kv_baseline"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # written out, or transformers 5 would make a dataclass's of its own


class Baseline(ContextKVForCausalLM):
    """The Context-KV model with another memory, and a feed-forward layer as wide as leaves it its size."""

    config_class: type[ContextKVConfig] = BaselineConfig
    attention: Any
    context_block: Any

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        shapes = shapes_of(config)
        sized: Any = dataclasses.replace(shapes, intermediate_size=shapes.inner_size)
        self.feed_forward = FeedForward(sized)
        if config.memory == "tokens":
            self.attention = ContextKVAttention(dataclasses.replace(sized, context_dim=shapes.memory_dim))
        elif config.memory != "end_to_end":
            kinds: dict[str, Any] = {"transformer": CausalAttention, "gru": GatedRecurrence}
            kind = kinds.get(config.memory)
            self.attention = kind(shapes) if kind else NoMemory()
        if config.memory != "end_to_end":
            self.context_block = TokenBlock()
        self.set_phase(2)

    def set_phase(self, phase: Literal[1, 2]) -> None:
        super().set_phase(phase)
        if self.config.memory == "end_to_end":
            self.context_block.requires_grad_(phase == 2)

    def drawn_dropout(self, count: int) -> Dropout:
        """As of contexts; where rows are read, none: each piece of a batch draws its own."""
        return super().drawn_dropout(count) if self.config.memory in ("tokens", "end_to_end") else NOT_DRAWN

    def read(self, batch: RowBatch, dropout: Dropout = NOT_DRAWN) -> Tensor:
        """Hidden states `[n, hidden_size]` at the batch's positions."""
        embeddings = self.embed(batch.ids)
        if self.config.memory != "end_to_end":
            hidden, added = self.attention(self.dropout(embeddings), batch.spans)
            return (hidden if self.config.output == "residual" else added) + self.feed_forward(hidden)
        with unrounded(embeddings.device):
            window, present = self._windows(embeddings.float(), batch)
        return self.attend(own_rows(embeddings, batch.spans), window, present, dropout)[0]

    def _windows(self, embeddings: Tensor, batch: RowBatch) -> tuple[Tensor, Tensor]:
        """As in `attend`, with contexts that the block makes now."""
        half = self.context_block.project_tokens(embeddings)
        state = half.new_zeros(len(half), self.config.context_dim)
        contexts = [state]
        for column, token in enumerate(half.unbind(1)):
            state = self.context_block(state.detach() if column % SEGMENT == 0 else state, token)
            contexts.append(state)
        held = torch.stack(contexts, dim=1)  # (rows, columns + 1, context_dim), the first before the row
        windows, present = [], []
        for row, first, (start, stop) in zip(held, batch.first.tolist(), batch.spans.tolist(), strict=True):
            places = torch.arange(first + start, first + stop, device=held.device)
            slots = slot_positions(places, self.config)
            present.append(slots >= 0)
            windows.append(torch.where(slots[..., None] >= 0, row[(slots - first + 1).clamp(min=0)], 0))
        return torch.cat(windows), torch.cat(present)


def shapes_of(config: ContextKVConfig) -> ModelConfig:
    """The `ModelConfig` in transformers' clothes."""
    return ModelConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)})


def model_class(memory: str) -> type[ContextKVForCausalLM]:
    """The model of `model.memory`."""
    return ContextKVForCausalLM if memory in FROZEN_BLOCK else Baseline


def is_cached(memory: str) -> bool:
    """Whether Phase 2 reads the memory from a cache; else it computes it from the tokens before."""
    return memory in (*FROZEN_BLOCK, "tokens")


def stream_of(cache: StreamCache, model: ModelConfig, trained: bool) -> StreamCache:
    """What Phase 2 reads a cached stream as: itself, or rows of its tokens.

    Args:
        trained: whether it is trained on; a recurrence reads more tokens before those that are measured.
    """
    if is_cached(model.memory):
        return cache
    reach = model.interval * (model.max_contexts - 1)
    burn_in = TRAINED_BURN_IN if trained else model.context_window
    history = {"transformer": model.context_window - 1, "gru": burn_in, "end_to_end": reach + burn_in}
    return TokenRows(cache.ids, cache.contexts, history=history.get(model.memory, 0))


def refuse_unserved(memory: str) -> None:
    """Raise a UserError if a model of this memory cannot read on token by token."""
    if memory not in WITH_BLOCK:
        raise UserError(
            f"The run is a baseline (model.memory={memory}), which is measured on its own streams only; "
            f"use one with model.memory={', '.join(WITH_BLOCK[:-1])} or {WITH_BLOCK[-1]}."
        )
