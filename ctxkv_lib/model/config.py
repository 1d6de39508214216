"""The shapes of the model, with their units and defaults."""

from dataclasses import dataclass

from .checks import SHARE, at_least, check_settings, require, setting


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
        {"none": "nothing", "learned": "a number a head; the keys' bias, which changes nothing, goes"},
    )
    output: str = setting(
        "residual",
        "the hidden state that the output head reads",
        {
            "residual": "token embedding, attention and feed-forward, summed and normed as published",
            "attended": "attention and feed-forward alone, so that the token just read is not proposed",
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

    def parameter_counts(self) -> dict[str, int]:
        """`total` and `trainable_phase2`, from the shapes alone."""
        h, c, inner = self.hidden_size, self.context_dim, self.intermediate_size
        norm = 2 * h
        table = self.vocab_size * h + norm
        block = (c + h + 1) * c + 2 * c
        scored = self.num_heads * self.max_contexts if self.slot_bias == "learned" else h  # the keys' bias
        attention = 2 * (h + 1) * h + c * h + scored + (c + 1) * h + norm
        feed_forward = (h + 1) * inner + (inner + 1) * h + norm
        trained = attention + feed_forward
        return {"total": table + block + trained, "trainable_phase2": trained}
