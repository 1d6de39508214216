"""The configuration of an experiment: five groups of settings, and plug-ins.

Each setting is documented where it is defined: in this module, in `data.config`, in `method.config`, or in
the class `Settings` of a plug-in.
"""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from ..data.config import DataConfig
from ..errors import UserError, as_user_errors, did_you_mean
from ..method.config import ModelConfig, Phase1Config, Phase2Config
from ..method.fields import Allowed, at_least, check_settings, require, setting
from ..plugins.plugins import KINDS, PACKAGE_PREFIX, PHASE1_KINDS, PlugIn, settings_of

# The largest allowed integer in a setting: LARGEST for two groups, and LARGEST_COUNT for all other groups.
# These limits keep products of sizes and counts below 2^63.
LARGEST = {"model": 2**20, "runtime": 2**63 - 1}
LARGEST_COUNT = 2**31 - 1


SEED = Allowed("0 to 2^63 - 1", lambda value: 0 <= value < 2**63)  # seeds that torch's generators accept
THREADS = Allowed("auto, or 1 to 1024", {"auto", *map(str, range(1, 1025))}.__contains__)


@dataclass(frozen=True)
class Sampling:
    """Settings for generating text."""

    max_new_tokens: int = setting(100, "maximum number of generated tokens", at_least(1))
    temperature: float = setting(
        0.8,
        "sampling temperature; 0 always takes the most likely token",
        Allowed("0 or more", lambda value: 0 <= value < math.inf),
    )
    top_k: int = setting(50, "number of most likely tokens to sample from", at_least(1))
    seed: int = setting(0, "random seed for sampling", SEED)

    def __post_init__(self) -> None:
        check_settings(self, "sampling")


@dataclass(frozen=True)
class RuntimeConfig:
    """Settings for the seed, the device, the precision, the threads and the caches of a run."""

    seed: int = setting(42, "random seed for the whole run", SEED)
    device: str = setting(
        "auto",
        "device to compute on",
        {
            "auto": "cuda if available, else mps, else cpu",
            "cpu": "",
            "cuda": "an NVIDIA GPU",
            "mps": "an Apple GPU",
        },
    )
    precision: str = setting(
        "auto",
        "dtype of the matrix products in Phase 2",
        {"auto": "bf16 if the processor or GPU supports it in hardware, else fp32", "fp32": "", "bf16": ""},
    )
    threads: str = setting("auto", "number of CPU threads; auto uses torch's default", THREADS)
    embedding_cache: str = setting(
        "gather",
        "what the cache stores for the tokens of a stream",
        {"gather": "only token ids", "dense": "also one embedding per position, as published"},
    )

    def __post_init__(self) -> None:
        check_settings(self, "runtime")


@dataclass(frozen=True)
class ExperimentConfig:
    """An experiment: all its settings and plug-ins, and the names of its preset and recipe."""

    preset: str = "colab"
    recipe: str = "published"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    phase1: Phase1Config = field(default_factory=Phase1Config)
    phase2: Phase2Config = field(default_factory=Phase2Config)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    plugins: dict[str, PlugIn] = field(default_factory=dict)  # by kind, a key of `KINDS`

    @property
    def has_contexts(self) -> bool:
        """Return whether the layer reads contexts. If it reads tokens, there is no block and no Phase 1."""
        layer = self.plugins.get("layer")
        return layer is None or not layer.reads_tokens

    @property
    def own_plugins(self) -> dict[str, PlugIn]:
        """The user's own plug-ins, by kind. Those of this package do not count."""
        return {
            kind: plugin
            for kind, plugin in self.plugins.items()
            if not plugin.name.startswith(PACKAGE_PREFIX)
        }

    @property
    def has_own_modules(self) -> bool:
        """Whether a part of the model is the user's own."""
        return any(KINDS[kind].is_module for kind in self.own_plugins)

    def to_dict(self) -> dict[str, Any]:
        """Return the whole configuration as a dict of JSON values. `config_from_dict` is the inverse."""
        groups = {name: dataclasses.asdict(getattr(self, name)) for name in GROUPS}
        plugins = {kind: plugin.to_dict() for kind, plugin in self.plugins.items()}
        return {"preset": self.preset, "recipe": self.recipe, **groups, **plugins}

    def flat(self) -> dict[str, Any]:
        """Return the preset, the recipe and all settings as `{"group.field": value}`."""
        settings: dict[str, Any] = {"preset": self.preset, "recipe": self.recipe}
        for group, values in self.to_dict().items():
            if group not in settings:
                settings |= {f"{group}.{name}": value for name, value in values.items()}
        return settings

    def defaults(self) -> dict[str, Any]:
        """Return the default of each setting as `{"group.field": value}`, with those of plug-ins."""
        defaults = ExperimentConfig().flat()
        for kind, plugin in self.plugins.items():
            defaults |= {f"{kind}.{name}": value for name, value in settings_of(plugin.part, {}).items()}
        return defaults

    @as_user_errors()
    def replace(self, settings: Mapping[str, Any]) -> "ExperimentConfig":
        """Return a copy of this configuration with the given settings.

        Args:
            settings: `{"group.field": value}`, such as `{"phase2.patience": 2}`. The group may be the kind of
                a plug-in, such as `block`. A string is parsed as JSON unless the setting is a string.

        Raises:
            UserError: A key or a value is not allowed.
        """
        changed: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            group, name, hint = self._field(key)
            changed.setdefault(group, {})[name] = _typed(key, value, hint)
        plugins = dict(self.plugins)
        for kind in changed.keys() & plugins.keys():
            values = settings_of(plugins[kind].part, {**plugins[kind].settings, **changed.pop(kind)})
            plugins[kind] = dataclasses.replace(plugins[kind], settings=values)
        groups = {group: dataclasses.replace(getattr(self, group), **new) for group, new in changed.items()}
        return dataclasses.replace(self, **groups, plugins=plugins)

    def with_plugins(self, **parts: Any) -> "ExperimentConfig":
        """Return a copy of this configuration with other plug-ins, which have their default settings.

        Args:
            parts: by kind, such as `block`: a class, a function, or its name `"module:Name"`; None removes
                the plug-in.

        Raises:
            UserError: A kind is unknown, a part is not a plug-in, or the layer reads tokens and `block` or
                `loss` is given, too.
        """
        for kind in parts:
            require_known("plug-in", kind, KINDS)
        given = {kind: None if part is None else PlugIn.of(part, kind) for kind, part in parts.items()}
        plugins = {kind: plugin for kind, plugin in {**self.plugins, **given}.items() if plugin}
        if parts and (layer := plugins.get("layer")) and layer.reads_tokens:
            for kind in PHASE1_KINDS:
                if given.get(kind):
                    raise UserError(
                        f"{layer.name} reads tokens, so there is no Phase 1 and {kind} has no effect; give "
                        "only one of the two plug-ins."
                    )
            plugins = {kind: plugin for kind, plugin in plugins.items() if kind not in PHASE1_KINDS}
        return dataclasses.replace(self, plugins=plugins)

    def _field(self, key: str) -> tuple[str, str, Any]:
        """Return the group of the setting `key`, the name of its field, and its type."""
        group, _, name = key.partition(".")
        if group in KINDS and group not in self.plugins:
            raise UserError(
                f"{key} is a setting of a plug-in, but no plug-in is given; add one with "
                f"--{group} module:Name ({group}=...)."
            )
        kinds = GROUPS | {
            kind: getattr(plugin.part, "Settings", None) for kind, plugin in self.plugins.items()
        }
        names = setting_names(kinds)
        if group not in kinds:
            raise UserError(
                f"Unknown setting {key!r}. Allowed: group.field, with group one of {', '.join(kinds)}."
                f"{did_you_mean(key, [*names, *kinds])}"
            )
        if key not in names:
            known = ", ".join(known for known in names if known.startswith(f"{group}."))
            raise UserError(f"Unknown setting {key!r}. Allowed: {known}.{did_you_mean(key, names)}")
        return group, name, typing.get_type_hints(kinds[group])[name]


GROUPS = {name: hint for name, hint in typing.get_type_hints(ExperimentConfig).items() if is_dataclass(hint)}


@as_user_errors()
def config_from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Rebuild a configuration from the result of `ExperimentConfig.to_dict` without importing plug-ins.

    Raises:
        UserError: This version of ctxkv_lib does not know a setting, or does not allow its value.
    """
    for name in values:
        require_known("setting", name, ("preset", "recipe", *GROUPS, *KINDS))
    config = ExperimentConfig(values["preset"], values["recipe"]).replace(
        {f"{group}.{name}": value for group in GROUPS for name, value in values[group].items()}
    )
    plugins = {}
    for kind in KINDS:
        if kind in values:
            settings = dict(values[kind])
            plugins[kind] = PlugIn(settings.pop("plugin"), settings.pop("code"), settings)
    return dataclasses.replace(config, plugins=plugins)


def differing_settings(configs: Sequence[ExperimentConfig]) -> list[dict[str, Any]]:
    """Return the settings that differ between experiments, e.g. `{"data.samples": 500}` for one experiment.

    The digest of a plug-in's code is left out, since it means nothing to a reader.
    """
    rows = [config.flat() for config in configs]
    digests = {f"{kind}.code" for kind in KINDS}
    keys = dict.fromkeys(key for settings in rows for key in settings if key not in digests)
    different = [key for key in keys if any(settings.get(key) != rows[0].get(key) for settings in rows)]
    return [{key: settings.get(key) for key in different} for settings in rows]


def require_config(config: Any) -> None:
    if not isinstance(config, ExperimentConfig):
        preset = repr(config) if isinstance(config, str) else '"offline"'
        kind = type(config).__name__
        raise UserError(f"{kind} is not a configuration; make one with ctxkv.build_config({preset}).")


def require_known(kind: str, value: Any, known: Iterable[str]) -> None:
    names = list(known)
    if value not in names:
        raise UserError(f"{kind} is {value!r}; allowed: {', '.join(names)}.{did_you_mean(str(value), names)}")


def setting_names(kinds: Mapping[str, Any] = GROUPS) -> list[str]:
    """List the names of all settings, as `group.field`."""
    return [
        f"{group}.{field.name}" for group, kind in kinds.items() if kind for field in dataclasses.fields(kind)
    ]


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Convert a value to the type of its setting. A string is parsed as JSON unless the setting is a string.

    Raises:
        ValueError: The value has the wrong type, is too large, or is not finite.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
    if isinstance(value, str) and (str not in kinds or (value == "null" and types.NoneType in kinds)):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kinds == (str,) and type(value) is int:
        value = str(value)  # a number of threads
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
