"""Every setting outside the model: its default, unit and reason. Defaults are those of the published runs."""

from dataclasses import dataclass

from ..method.settings import POSITIVE, SHARE, Allowed, at_least, check_settings, require, setting

SEED_LIMIT = 2**63  # what torch's generators take
LARGE_STREAM = 4_000_000  # tokens, whose contexts take 2 GB in bf16, 4 GB in fp32
# Of a streamed stream:
STRIDE = 256  # tokens between two contexts that are kept
BLOCK_TOKENS = 65_536  # consecutive positions that come into a pool together; fewer, to be whole batches
POOL_BLOCKS = 8  # a pool takes 256 MiB in bf16, 512 in fp32, at the published size
BEGINNING_TOKENS = 65_536  # of a streamed stream, so many contexts are kept for those who look at them
RATE = Allowed("more than 0, at most 1e30", lambda value: 0 < value <= 1e30)  # beyond, a step overflows
WEIGHT = Allowed("0 to 1e30", lambda value: 0 <= value <= 1e30)
BELOW_1 = Allowed("0 or more, less than 1", lambda value: 0 <= value < 1)
SEED = Allowed("0 to 2^63 - 1", range(SEED_LIMIT).__contains__)
THREADS = Allowed("auto, or 1 to 1024", {"auto", *map(str, range(1, 1025))}.__contains__)


@dataclass(frozen=True)
class Phase1Config:
    """OACD training of the ContextBlock, and how the context caches are made from it."""

    max_iterations: int = setting(
        60, "it stops earlier once contexts have settled", at_least(2), "iterations"
    )
    batch_size: int = setting(5000, "consecutive positions at a time", at_least(2), "positions")
    max_tokens: int = setting(
        2_000_000,
        "contexts=exact: of a longer stream it trains on even samples, batches of consecutive positions",
        at_least(1),
        "positions",
    )
    learning_rate: float = setting(0.002, "of Adam, one step an iteration", RATE)
    noise_std: float = setting(0.1, "added to the input contexts while training", at_least(0))
    initial_std: float = setting(0.01, "of the contexts of iteration 1", at_least(0))
    weight_std: float = setting(0.1, "of the untrained weights; smaller ones forget more slowly", POSITIVE)
    longest_mean: float = setting(
        0.0,
        "half of the units begin with the token, half with running means of 4 to so many tokens; 0: weights "
        "are drawn, as published",
        Allowed("0, or 4 or more", lambda value: value == 0 or value >= 4),
        "tokens",
    )
    last_tokens: int = setting(
        0,
        "contexts begin as so many last tokens, one by one, each in units of its own; 0: they do not",
        Allowed("0, or 2 or more", lambda value: value == 0 or value >= 2),
        "tokens",
    )
    centroid_weight: float = setting(
        0.1, "of ||mean(X)||^2 in the loss: holds contexts at the origin", WEIGHT
    )
    clip_norm: float = setting(2.0, "largest norm of a step's gradient", POSITIVE)
    convergence_threshold: float = setting(
        0.03, "below it a position has converged", at_least(0), "mean squared change"
    )
    stop_rate: float = setting(
        0.90, "stop once so many positions have converged", SHARE, "share of positions"
    )
    plateau_rate: float = setting(0.50, "above it, plateau_gain is asked for", SHARE, "share of positions")
    plateau_gain: float = setting(0.01, "an iteration that gains less stalls", SHARE, "share of positions")
    plateau_patience: int = setting(2, "stop after so many stalled in a row", at_least(1), "iterations")
    contexts: str = setting(
        "passes",
        "how the caches are computed",
        {
            "passes": "parallel passes, as published: 1, of validation validation_passes",
            "exact": "true recurrence",
        },
    )
    validation_passes: int = setting(3, "contexts=passes: for the validation contexts", at_least(1), "passes")
    tolerance: float = setting(1e-5, "contexts=exact: largest error of a context component", POSITIVE)
    rank_rows: int = setting(10_000, "contexts drawn for the effective rank", at_least(1), "contexts")

    def __post_init__(self) -> None:
        check_settings(self, "phase1")
        if self.longest_mean:
            require(not self.last_tokens, "phase1.last_tokens", self.last_tokens, "0 with longest_mean")


@dataclass(frozen=True)
class Phase2Config:
    """Next-token training of attention and feed-forward over the cached contexts."""

    max_epochs: int = setting(40, "it stops earlier once validation no longer gains", at_least(1), "epochs")
    batch_size: int = setting(512, "drawn by a random permutation each epoch", at_least(1), "positions")
    learning_rate: float = setting(1e-3, "of AdamW, default betas; the largest of a schedule", RATE)
    schedule: str = setting(
        "constant",
        "of the learning rate",
        {"constant": "", "cosine": "down to 0 at the end of max_epochs, after the warm-up"},
    )
    warmup: float = setting(0.0, "of the planned steps, over which the rate rises from 0", SHARE, "share")
    weight_decay: float = setting(0.01, "of AdamW", at_least(0))
    decayed: str = setting(
        "all",
        "which weights decay",
        {"all": "", "matrices": "those of linear layers; not biases, and not scales and shifts of norms"},
    )
    decay_tokens: int = setting(
        0,
        "training tokens that weight_decay is meant for; with fewer or more, decay is the same an epoch, not "
        "a step; 0: a step",
        at_least(0),
        "tokens",
    )
    averaging: float = setting(
        0.0, "share of the averaged weights that a step keeps; they are validated and kept", BELOW_1, "share"
    )
    patience: int = setting(3, "stop after so many without a lower validation PPL", at_least(1), "epochs")

    def __post_init__(self) -> None:
        check_settings(self, "phase2")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how it runs."""

    seed: int = setting(42, "of everything random", SEED)
    device: str = setting(
        "auto",
        "where it computes",
        {"auto": "cuda, else mps, else cpu", "cpu": "", "cuda": "an NVIDIA GPU", "mps": "an Apple GPU"},
    )
    precision: str = setting(
        "auto",
        "of Phase 2's matrix products",
        {"auto": "bf16 if that is measured to be faster", "fp32": "", "bf16": ""},
    )
    threads: str = setting("auto", "of a CPU; auto: one or more, as measured when a run begins", THREADS)
    embedding_cache: str = setting(
        "gather",
        "how the tokens of a stream are held",
        {"gather": "token ids and one table", "dense": "one row a position, as published"},
    )
    contexts: str = setting(
        "auto",
        "where Phase 2 has the contexts of training from",
        {
            "auto": f"streamed where it can be and tokens are more than {LARGE_STREAM:,}",
            "cached": "all are kept; an epoch visits positions in one permutation",
            "streamed": "exact ones, made when needed; an epoch shuffles a pool of blocks at a time",
        },
    )
    tracker: str = setting(
        "none",
        "where each line of metrics.jsonl goes, too, through accelerate",
        {"none": "", "tensorboard": "folder tracker of the run folder", "wandb": "Weights & Biases"},
    )

    def __post_init__(self) -> None:
        check_settings(self, "runtime")
