"""The shapes of the model, with their units and defaults."""

from dataclasses import dataclass

from .checks import at_least, one_of, require, share


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the model. `ContextKVConfig` in `modeling.py` takes its defaults from here."""

    vocab_size: int = 50257  # GPT-2's BPE
    hidden_size: int = 768  # width of the token table
    context_dim: int = 256
    interval: int = 20  # tokens between two contexts that attention sees
    max_contexts: int = 32  # contexts that attention sees at one position
    num_heads: int = 8
    intermediate_size: int = 3072
    attention_dropout: float = 0.1
    kv_method: str = "fixed"  # fixed: always max_contexts slots, zeros attended | variable: masked
    anchor: str = "current"  # current: slots count back from the position | grid: on interval's multiples

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "context_dim", "interval", "max_contexts", "num_heads")
        at_least(self, "model", 1, *sizes, "intermediate_size")
        require(
            self.hidden_size % self.num_heads == 0,
            "model.num_heads",
            self.num_heads,
            f"a divisor of model.hidden_size ({self.hidden_size})",
        )
        share(self, "model", "attention_dropout")
        one_of("model.kv_method", self.kv_method, ("fixed", "variable"))
        one_of("model.anchor", self.anchor, ("current", "grid"))

    @property
    def context_window(self) -> int:
        """Tokens of history that one position can reach."""
        return self.interval * self.max_contexts
