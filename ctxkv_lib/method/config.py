"""Settings for the model, Phase 1 and Phase 2. Each setting has a unit and a purpose."""

from dataclasses import dataclass

from .fields import POSITIVE, RATE, SHARE, WEIGHT, Allowed, at_least, check_settings, require, setting

GPT2_VOCAB_SIZE = 50_257


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of the model and the settings of its attention."""

    hidden_size: int = setting(
        768, "size of a token embedding; the default is GPT-2's", at_least(1), "numbers"
    )
    context_dim: int = setting(
        256, "size of a context vector, the model's only memory of the text", at_least(2), "numbers"
    )
    interval: int = setting(
        20, "distance between neighboring contexts that attention reads", at_least(1), "tokens"
    )
    max_contexts: int = setting(32, "contexts that attention reads per position", at_least(1), "contexts")
    num_heads: int = setting(8, "number of attention heads; must divide hidden_size", at_least(1), "heads")
    intermediate_size: int = setting(3072, "inner width of the feed-forward layer", at_least(1), "numbers")
    attention_dropout: float = setting(
        0.1, "dropout on the attention weights, to reduce overfitting", SHARE, "share"
    )
    kv_method: str = setting(
        "fixed",
        "what attention does with slots before the start of the stream",
        {"fixed": "treats them as zero vectors", "variable": "masks them"},
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")
        allowed = f"a divisor of model.hidden_size ({self.hidden_size})"
        require(self.hidden_size % self.num_heads == 0, "model.num_heads", self.num_heads, allowed)

    @property
    def context_window(self) -> int:
        """Return the length of the window that attention reads, in tokens."""
        return self.interval * self.max_contexts


@dataclass(frozen=True)
class Phase1Config:
    """Settings for Phase 1 (see `oacd`) and for computing contexts with the trained block."""

    max_iterations: int = setting(
        60,
        "maximum number of iterations (0 leaves the ContextBlock untrained); training stops earlier if the "
        "contexts converge",
        Allowed("0, or 2 or more", lambda value: value == 0 or value >= 2),
        "iterations",
    )
    batch_size: int = setting(5000, "number of consecutive positions per batch", at_least(2), "positions")
    max_tokens: int = setting(
        2_000_000,
        "with context_method=exact: maximum number of training positions; a longer stream is reduced to "
        "evenly spaced chunks of batch_size positions",
        at_least(1),
        "positions",
    )
    learning_rate: float = setting(0.002, "learning rate of Adam, which takes one step per iteration", RATE)
    noise_std: float = setting(
        0.1, "standard deviation of the noise added to the input contexts in training", at_least(0)
    )
    initial_std: float = setting(
        0.01, "standard deviation of the random contexts in iteration 1", at_least(0)
    )
    weight_std: float = setting(
        0.1,
        "standard deviation of the initial weights; a block with smaller weights forgets more slowly",
        POSITIVE,
    )
    centroid_weight: float = setting(
        0.1, "weight of ||mean(X)||^2 in the loss; this term keeps the mean context near 0", WEIGHT
    )
    clip_norm: float = setting(2.0, "maximum norm of the gradient; larger gradients are clipped", POSITIVE)
    convergence_threshold: float = setting(
        0.03,
        "a position has converged if its context changes by less than this in one iteration",
        at_least(0),
        "mean squared change",
    )
    stop_rate: float = setting(
        0.90, "training stops once this share of positions has converged", SHARE, "share of positions"
    )
    plateau_rate: float = setting(
        0.50, "plateau_gain applies only above this share of converged positions", SHARE, "share of positions"
    )
    plateau_gain: float = setting(
        0.01,
        "an iteration counts as stalled if the share of converged positions grows by less than this",
        SHARE,
        "share of positions",
    )
    plateau_patience: int = setting(
        2, "training stops after this many stalled iterations in a row", at_least(1), "iterations"
    )
    context_method: str = setting(
        "passes",
        "how contexts are computed after training",
        {
            "passes": "1 parallel pass over the training text and validation_passes over the validation text",
            "exact": "exact recurrence",
        },
    )
    validation_passes: int = setting(
        3, "with context_method=passes: number of passes over the validation text", at_least(1), "passes"
    )
    tolerance: float = setting(
        1e-5,
        "with context_method=exact: target error per context component; a block may amplify errors",
        POSITIVE,
    )

    def __post_init__(self) -> None:
        check_settings(self, "phase1")


@dataclass(frozen=True)
class Phase2Config:
    """Settings for Phase 2, which trains the layer to predict the next token."""

    max_epochs: int = setting(
        40,
        "maximum number of epochs; training stops earlier if validation PPL stops improving",
        at_least(1),
        "epochs",
    )
    batch_size: int = setting(
        512, "positions per batch; their order is random and new in each epoch", at_least(1), "positions"
    )
    optimizer: str = setting(
        "adamw",
        "optimizer of Phase 2",
        {
            "adamw": "AdamW with a constant learning rate, as published",
            "scheduled": "AdamW with warm-up and cosine decay of the learning rate, averaged weights, and "
            "weight decay for matrices only, which is the same per epoch for a text of any length",
        },
    )
    learning_rate: float = setting(1e-3, "learning rate of AdamW; its betas are torch's defaults", RATE)
    weight_decay: float = setting(0.01, "weight decay of AdamW", at_least(0))
    patience: int = setting(
        3, "training stops after this many epochs without a lower validation PPL", at_least(1), "epochs"
    )

    def __post_init__(self) -> None:
        check_settings(self, "phase2")

    @property
    def least_epochs(self) -> int:
        """Return the minimum number of epochs: 1 + `patience`, because the first epoch always improves."""
        return min(1 + self.patience, self.max_epochs)
