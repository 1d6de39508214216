"""The shapes of the model, with their units and defaults."""

import math
from dataclasses import dataclass

from .settings import SHARE, at_least, check_settings, require, setting

FROZEN_BLOCK = ("contexts", "fresh")  # memories made before Phase 2, by a ContextBlock it leaves alone
WITH_BLOCK = (*FROZEN_BLOCK, "end_to_end")


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the model. `ContextKVConfig` in `modeling.py` takes its defaults from here."""

    vocab_size: int = setting(50257, "GPT-2's BPE", at_least(1), "tokens")
    hidden_size: int = setting(768, "width of the token table, GPT-2's", at_least(1), "numbers")
    context_dim: int = setting(
        256, "size of a context, all that is known of the text so far", at_least(1), "numbers"
    )
    interval: int = setting(20, "distance of two contexts that attention sees", at_least(1), "tokens")
    max_contexts: int = setting(32, "contexts that attention sees at one position", at_least(1), "contexts")
    num_heads: int = setting(8, "heads of attention; a divisor of hidden_size", at_least(1), "heads")
    intermediate_size: int = setting(3072, "inner width of the feed-forward layer", at_least(1), "numbers")
    attention_dropout: float = setting(0.1, "on the attention weights, against overfitting", SHARE, "share")
    input_dropout: float = setting(0.0, "on the token embeddings that attention reads", SHARE, "share")
    layer_dropout: float = setting(
        0.0, "on what attention adds, within and after the feed-forward layer", SHARE, "share"
    )
    kv_method: str = setting(
        "fixed",
        "what attention does with slots before the start of the stream",
        {"fixed": "always max_contexts slots, zeros attended", "variable": "only slots that exist"},
    )
    anchor: str = setting(
        "current",
        "where the slots of a window lie",
        {"current": "counted back from the position", "grid": "on the interval's multiples"},
    )
    slots: str = setting(
        "uniform",
        "how far the slots of a window lie apart",
        {
            "uniform": "the interval, as published",
            "geometric": "0, 1, 2, ... and ever further, to the reach of uniform ones",
        },
    )
    slot_bias: str = setting(
        "none",
        "what a slot's place adds to its score",
        {
            "none": "nothing",
            "learned": "a number a head; the keys' bias, which changes nothing, goes",
            "own": "the same, and each head begins with a slot of its own, the nearest ones",
            "near": "the same, and heads begin with slots 1 to 4, three of eight with the first",
        },
    )
    sink: str = setting(
        "none",
        "whether a head may attend no slot",
        {"none": "", "learned": "a number a head scores it; the keys' bias goes"},
    )
    heads: str = setting(
        "drawn",
        "how heads begin",
        {
            "drawn": "with random weights",
            "look_up": "with phase1.last_tokens: each looks for the token just read at one place of the "
            "contexts, and brings what followed it",
        },
    )
    output: str = setting(
        "residual",
        "the hidden state that the output head reads",
        {
            "residual": "token embedding, attention and feed-forward, summed and normed as published",
            "attended": "attention and feed-forward alone, so that the token just read is not proposed",
        },
    )

    repeat_logit: float = setting(
        0.0, "added to the logit of the token just read, which seldom comes again; never trained"
    )
    memory: str = setting(
        "contexts",
        "what a position knows of the text before it; all others are baselines, as many trained weights",
        {
            "contexts": "contexts of the ContextBlock that Phase 1 trains",
            "fresh": "contexts of a ContextBlock as Phase 1 would begin with it",
            "end_to_end": "contexts of one that Phase 2 trains through its recurrence",
            "tokens": "instead of contexts, the normed embeddings of the tokens at the slots",
            "none": "nothing",
            "transformer": "attention to each token of the window, biased by its distance",
            "gru": "the state of a GRU",
        },
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")
        require(
            self.hidden_size % self.num_heads == 0,
            "model.num_heads",
            self.num_heads,
            f"a divisor of model.hidden_size ({self.hidden_size})",
        )
        fits = self.anchor == "current" or self.slots == "uniform"
        require(fits, "model.anchor", self.anchor, "current with model.slots=geometric")

    @property
    def context_window(self) -> int:
        """Tokens of history that one position can reach."""
        return self.interval * self.max_contexts

    @property
    def kept_contexts(self) -> int:
        """Contexts that reading on from a text needs: a window's reach, or its slots on a grid."""
        step = 1 if self.anchor == "current" else self.interval
        return (self.max_contexts - 1) * self.interval // step + 1

    @property
    def memory_dim(self) -> int:
        """Width of what is cached at each position."""
        widths = {"contexts": self.context_dim, "fresh": self.context_dim, "tokens": self.hidden_size}
        return widths.get(self.memory, 0)

    @property
    def inner_size(self) -> int:
        """`intermediate_size`; of a baseline what keeps the trained weights as many as with contexts."""
        if self.memory in FROZEN_BLOCK:
            return self.intermediate_size
        spare = self.attention_size(self.context_dim) - self._memory_size()
        return max(1, self.intermediate_size + round(spare / (2 * self.hidden_size + 1)))

    @property
    def gru_units(self) -> int:
        """The most with which a GRU and its projection have no more weights than attention to contexts."""
        linear = 4 * self.hidden_size + 6  # of the weights 3 (h u + u^2 + 2 u) + (u + 1) h + 2 h
        room = self.attention_size(self.context_dim) - 3 * self.hidden_size
        return max(1, int((math.sqrt(linear**2 + 12 * room) - linear) / 6))

    def parameter_counts(self) -> dict[str, int]:
        """`total` and `trainable_phase2`, from the shapes alone."""
        h, inner = self.hidden_size, self.inner_size
        table = self.vocab_size * h + 2 * h
        feed_forward = (h + 1) * inner + (inner + 1) * h + 2 * h
        trained = self._memory_size() + feed_forward
        frozen_block = self.block_size() if self.memory in FROZEN_BLOCK else 0
        return {"total": table + frozen_block + trained, "trainable_phase2": trained}

    def _memory_size(self) -> int:
        """Trained weights of all but the feed-forward layer."""
        h, units = self.hidden_size, self.gru_units
        biases = self.num_heads * self.context_window
        sizes = {
            "end_to_end": self.attention_size(self.context_dim) + self.block_size(),
            "tokens": self.attention_size(h),
            "none": 0,
            "transformer": 3 * (h + 1) * h + h * h + biases + 2 * h,
            "gru": 3 * (h + units + 2) * units + (units + 1) * h + 2 * h,
        }
        return sizes.get(self.memory, self.attention_size(self.context_dim))

    def attention_size(self, width: int) -> int:
        """Weights of attention to slots of this width, with its norm."""
        h = self.hidden_size
        slots = (self.slot_bias != "none") * self.max_contexts + (self.sink != "none")
        scored = self.num_heads * slots or h  # without either, the keys' bias
        return 2 * (h + 1) * h + width * h + scored + (width + 1) * h + 2 * h

    def block_size(self) -> int:
        c = self.context_dim
        return (c + self.hidden_size + 1) * c + 2 * c
