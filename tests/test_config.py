"""Settings: presets and recipes, how users change settings, and which values are refused."""

import pytest

from ctxkv_lib.errors import UserError
from ctxkv_lib.runs.config import config_from_dict
from ctxkv_lib.runs.presets import PRESETS, RECIPES, build_config


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_configuration_survives_conversion_to_a_dictionary(preset, recipe):
    config = build_config(preset, recipe, settings={"phase2.batch_size": "64"})
    assert config_from_dict(config.to_dict()) == config
    assert config.phase2.batch_size == 64


def test_a_plug_in_has_its_own_settings_and_a_layer_that_reads_tokens_drops_phase_1():
    tuned = build_config("offline", "tuned", settings={"layer.layer_dropout": "0.3"})
    tuned = tuned.replace({"layer.copy_weight": 0.1})  # keeps the other settings
    assert tuned.plugins["layer"].settings["layer_dropout"] == 0.3
    plain = tuned.with_plugins(layer=None, block=None)
    assert plain.plugins == {}
    mixed = tuned.with_plugins(layer="tiny:PreviousToken")
    assert {*mixed.plugins} == {"layer"}
    assert config_from_dict(mixed.to_dict()) == mixed
    with pytest.raises(
        UserError, match="reads tokens, so there is no Phase 1 and loss has no effect; give only"
    ):
        mixed.with_plugins(loss="torch:sum")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("preset", "moon", "preset is 'moon'; allowed: colab, offline, ci."),
        ("data.samples", "many", "data.samples is 'many'; allowed: a value of type int."),
        ("model.num_heads", "7", "allowed: a divisor of model.hidden_size (768)."),
        ("loss.power", "2", "no plug-in is given; add one with --loss module:Name (loss=...)."),
        ("block", "", "Unknown setting 'block'. Allowed: block.longest_mean."),
        ("layer.copy_weight", "1", "layer.copy_weight is 1.0; allowed: 0 or more, less than 1."),
        ("phase2.learning_rate", "NaN", "allowed: finite numbers."),
        ("runtime.seed", 2**63, "allowed: whole numbers up to 9223372036854775807."),
        ("phase2.learning_rate", "0", "allowed: more than 0, at most 1e30."),
    ],
)
def test_a_refused_value_is_answered_with_what_is_allowed(key, value, said):
    given = {key: value} if key in ("preset", "recipe") else {"settings": {key: value}}
    with pytest.raises(UserError) as refused:
        build_config(**{"preset": "colab", "recipe": "tuned", **given})
    assert said in str(refused.value)
