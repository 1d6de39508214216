"""The settings of the published method: shapes of the model and both phases, with units and reasons."""

from dataclasses import dataclass

from .fields import POSITIVE, RATE, SHARE, WEIGHT, Allowed, at_least, check_settings, require, setting

GPT2_VOCAB_SIZE = 50_257


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the model."""

    hidden_size: int = setting(768, "width of the token table, GPT-2's", at_least(1), "numbers")
    context_dim: int = setting(256, "size of a context, all that is kept of the text", at_least(2), "numbers")
    interval: int = setting(20, "distance between two contexts that attention reads", at_least(1), "tokens")
    max_contexts: int = setting(32, "contexts that attention reads at one position", at_least(1), "contexts")
    num_heads: int = setting(8, "heads of attention; a divisor of hidden_size", at_least(1), "heads")
    intermediate_size: int = setting(3072, "inner width of the feed-forward layer", at_least(1), "numbers")
    attention_dropout: float = setting(0.1, "on the attention weights, against overfitting", SHARE, "share")
    kv_method: str = setting(
        "fixed",
        "what attention does with slots before the start of the stream",
        {"fixed": "always max_contexts slots, zeros attended", "variable": "only slots that exist"},
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")
        allowed = f"a divisor of model.hidden_size ({self.hidden_size})"
        require(self.hidden_size % self.num_heads == 0, "model.num_heads", self.num_heads, allowed)

    @property
    def context_window(self) -> int:
        """Tokens of history that one position can reach."""
        return self.interval * self.max_contexts


@dataclass(frozen=True)
class Phase1Config:
    """OACD training of the ContextBlock, and how the context caches are computed from it."""

    max_iterations: int = setting(
        60,
        "it stops earlier once contexts have converged; 0 leaves the ContextBlock untrained",
        Allowed("0, or 2 or more", lambda value: value == 0 or value >= 2),
        "iterations",
    )
    batch_size: int = setting(5000, "consecutive positions at a time", at_least(2), "positions")
    max_tokens: int = setting(
        2_000_000,
        "context_method=exact: of a longer stream it trains on evenly spaced runs of batch_size positions",
        at_least(1),
        "positions",
    )
    learning_rate: float = setting(0.002, "of Adam, one step an iteration", RATE)
    noise_std: float = setting(0.1, "added to the input contexts while training", at_least(0))
    initial_std: float = setting(0.01, "of the contexts of iteration 1", at_least(0))
    weight_std: float = setting(0.1, "of the untrained weights; smaller ones forget more slowly", POSITIVE)
    centroid_weight: float = setting(0.1, "of ||mean(X)||^2 in the loss: anchors contexts at 0", WEIGHT)
    clip_norm: float = setting(2.0, "largest norm of a step's gradient", POSITIVE)
    convergence_threshold: float = setting(
        0.03, "below it a position has converged", at_least(0), "mean squared change"
    )
    stop_rate: float = setting(0.90, "stop once so many have converged", SHARE, "share of positions")
    plateau_rate: float = setting(0.50, "above it, plateau_gain is asked for", SHARE, "share of positions")
    plateau_gain: float = setting(0.01, "an iteration that gains less stalls", SHARE, "share of positions")
    plateau_patience: int = setting(2, "stop after so many stalled in a row", at_least(1), "iterations")
    context_method: str = setting(
        "passes",
        "how the caches are computed",
        {
            "passes": "parallel passes: 1 over the training text, validation_passes over the validation text",
            "exact": "exact recurrence",
        },
    )
    validation_passes: int = setting(
        3, "context_method=passes: for validation contexts", at_least(1), "passes"
    )
    tolerance: float = setting(
        1e-5,
        "context_method=exact: target error of a context component; a block that amplifies errors exceeds it",
        POSITIVE,
    )

    def __post_init__(self) -> None:
        check_settings(self, "phase1")


@dataclass(frozen=True)
class Phase2Config:
    """Next-token training of the layer on the caches."""

    max_epochs: int = setting(40, "it stops earlier once validation PPL stalls", at_least(1), "epochs")
    batch_size: int = setting(512, "drawn by a random permutation each epoch", at_least(1), "positions")
    optimizer: str = setting(
        "adamw",
        "how Phase 2 steps",
        {
            "adamw": "AdamW at a constant rate, as published",
            "scheduled": "with warm-up and cosine, decay of matrices only and the same an epoch, and an "
            "average of the weights",
        },
    )
    learning_rate: float = setting(1e-3, "of AdamW, default betas", RATE)
    weight_decay: float = setting(0.01, "of AdamW", at_least(0))
    patience: int = setting(3, "stop after so many without a lower validation PPL", at_least(1), "epochs")

    def __post_init__(self) -> None:
        check_settings(self, "phase2")

    @property
    def least_epochs(self) -> int:
        """Epochs before training can stop early: the first always improves, then `patience` more."""
        return min(1 + self.patience, self.max_epochs)
