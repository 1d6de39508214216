"""The model's shapes as transformers saves them."""

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from ..method.config import GPT2_VOCAB_SIZE, ModelConfig
from ..method.settings import require

NAMES = [field.name for field in dataclasses.fields(ModelConfig)]


class ContextKVConfig(PretrainedConfig):
    """The fields of `ModelConfig`, with defaults and checks, and further fields of a saved model.

    `intermediate_size` is by default four times `hidden_size`.

    Attributes:
        vocab_size: tokens of the table.
        has_unigram: whether log-frequencies are added to the logits.
        plugins: `{"block": {"plugin": "module:Name", "settings": {...}}, ...}` of the classes that
            replace published parts (see `plugins.py`); may hold `source`, the `file_digest` of its file.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    model_type = "context_kv"
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012 (transformers' own form)
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        if "hidden_size" in kwargs:
            kwargs.setdefault("intermediate_size", 4 * kwargs["hidden_size"])
        vars(self).update({name: kwargs.pop(name, getattr(ModelConfig, name)) for name in NAMES})
        self.vocab_size = kwargs.pop("vocab_size", GPT2_VOCAB_SIZE)
        self.shapes()
        self.num_hidden_layers = 1
        self.use_cache = kwargs.pop("use_cache", True)
        self.has_unigram = kwargs.pop("has_unigram", False)
        self.plugins = kwargs.pop("plugins", {})
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)

    def shapes(self) -> ModelConfig:
        """Return the `ModelConfig` of the fields; raises ValueError as the constructor does."""
        shapes = ModelConfig(**{name: getattr(self, name) for name in NAMES})
        for name in ("vocab_size", *NAMES):
            value, is_count = getattr(self, name), isinstance(getattr(ModelConfig, name, 1), int)
            holds = not is_count or (type(value) is int and value > 0)
            require(holds, f"model.{name}", value, "a whole number, 1 or more")
        return shapes
