"""The model's shapes as transformers saves them."""

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from ..method.config import ModelConfig

# Named for transformers 4: loading a saved model, it takes along only the files that this one names.
from ..method.settings import require as require


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
        self.has_unigram = kwargs.pop("has_unigram", False)  # whether log-frequencies are added to the logits
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)
