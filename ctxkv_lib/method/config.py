"""The settings of the published method: the model's shapes and both phases, with units and reasons."""

from dataclasses import dataclass

from .fields import POSITIVE, RATE, SHARE, WEIGHT, Allowed, at_least, check_settings, require, setting

GPT2_VOCAB_SIZE = 50_257


@dataclass(frozen=True)
class ModelConfig:
    """The shapes of the model."""

    hidden_size: int = setting(
        768, "width of the token table; the default is GPT-2's", at_least(1), "numbers"
    )
    context_dim: int = setting(
        256, "size of a context vector, the model's only memory of the text", at_least(2), "numbers"
    )
    interval: int = setting(20, "distance between two contexts that attention reads", at_least(1), "tokens")
    max_contexts: int = setting(32, "contexts that attention reads at one position", at_least(1), "contexts")
    num_heads: int = setting(8, "number of attention heads; must divide hidden_size", at_least(1), "heads")
    intermediate_size: int = setting(3072, "inner width of the feed-forward layer", at_least(1), "numbers")
    attention_dropout: float = setting(
        0.1, "dropout on the attention weights, against overfitting", SHARE, "share"
    )
    kv_method: str = setting(
        "fixed",
        "what attention does with slots before the start of the stream",
        {"fixed": "attends to their zeros", "variable": "masks them"},
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")
        allowed = f"a divisor of model.hidden_size ({self.hidden_size})"
        require(self.hidden_size % self.num_heads == 0, "model.num_heads", self.num_heads, allowed)

    @property
    def context_window(self) -> int:
        """Return how many tokens of history one position can reach."""
        return self.interval * self.max_contexts


@dataclass(frozen=True)
class Phase1Config:
    """The settings of Phase 1 (see `oacd`), and of the context caches that the trained block computes."""

    max_iterations: int = setting(
        60,
        "maximum number of iterations; training stops earlier once contexts have converged, and 0 leaves the "
        "ContextBlock untrained",
        Allowed("0, or 2 or more", lambda value: value == 0 or value >= 2),
        "iterations",
    )
    batch_size: int = setting(5000, "number of consecutive positions per chunk", at_least(2), "positions")
    max_tokens: int = setting(
        2_000_000,
        "context_method=exact: maximum training positions; from a longer stream, evenly spaced chunks of "
        "batch_size positions are used",
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
        0.1, "weight of ||mean(X)||^2 in the loss, which anchors contexts at 0", WEIGHT
    )
    clip_norm: float = setting(2.0, "maximum norm of the gradient in one step", POSITIVE)
    convergence_threshold: float = setting(
        0.03,
        "a position has converged when its context changes by less than this",
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
        "an iteration stalls if the share of converged positions grows by less than this",
        SHARE,
        "share of positions",
    )
    plateau_patience: int = setting(
        2, "training stops after this many stalled iterations in a row", at_least(1), "iterations"
    )
    context_method: str = setting(
        "passes",
        "how the caches are computed",
        {
            "passes": "parallel passes: 1 over the training text, validation_passes over the validation text",
            "exact": "exact recurrence",
        },
    )
    validation_passes: int = setting(
        3, "context_method=passes: number of passes over the validation text", at_least(1), "passes"
    )
    tolerance: float = setting(
        1e-5,
        "context_method=exact: target error per context component; a block that amplifies errors exceeds it",
        POSITIVE,
    )

    def __post_init__(self) -> None:
        check_settings(self, "phase1")


@dataclass(frozen=True)
class Phase2Config:
    """The settings of Phase 2, which trains the layer to predict the next token."""

    max_epochs: int = setting(
        40,
        "maximum number of epochs; training stops earlier once validation PPL stalls",
        at_least(1),
        "epochs",
    )
    batch_size: int = setting(
        512, "batch size; each epoch visits the positions in a new random order", at_least(1), "positions"
    )
    optimizer: str = setting(
        "adamw",
        "optimizer of Phase 2",
        {
            "adamw": "AdamW at a constant rate, as published",
            "scheduled": "AdamW with warm-up and cosine decay of the rate, weight decay for matrices only "
            "(the same per epoch for a text of any length), and averaged weights",
        },
    )
    learning_rate: float = setting(1e-3, "learning rate of AdamW, which has torch's default betas", RATE)
    weight_decay: float = setting(0.01, "weight decay of AdamW", at_least(0))
    patience: int = setting(
        3, "training stops after this many epochs without a lower validation PPL", at_least(1), "epochs"
    )

    def __post_init__(self) -> None:
        check_settings(self, "phase2")

    @property
    def least_epochs(self) -> int:
        """Return the minimum number of epochs: the first, which always improves, and `patience` more."""
        return min(1 + self.patience, self.max_epochs)
