import dataclasses

import pytest

from ctxkv_lib.errors import UserError
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.runs.config import PRESETS, RECIPES, build_config, config_from_dict, parse_settings


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_config_survives_its_dictionary(preset, recipe):
    config = build_config(preset, recipe, settings={"phase2.batch_size": "64"})
    assert config_from_dict(config.to_dict()) == config
    assert config.phase2.batch_size == 64


def test_published_settings_are_the_defaults_of_colab():
    config = build_config("colab")
    assert (config.recipe, config.data.samples, config.phase1.contexts) == ("published", 500, "passes")
    assert (config.model, config.model.context_window) == (ModelConfig(), 640)


def test_recipes_differ_only_in_contexts_and_precision():
    published, exact = build_config("colab", "published"), build_config("colab", "exact")
    assert published.runtime.precision == "fp32"  # as published
    same = exact.replace({"phase1.contexts": "passes", "runtime.precision": "fp32"})
    assert dataclasses.replace(same, recipe="published") == published


def test_names_of_earlier_versions_are_still_understood():
    published = build_config("colab", "published")
    assert build_config("colab", "seed") == published
    own = {"data.source": "jsonl", "data.path": "chats.jsonl"}
    assert build_config("colab", settings=own).data.source == "file"
    stored = published.to_dict()
    stored["recipe"] = stored["phase1"]["contexts"] = "seed"
    assert config_from_dict(stored) == published


def test_what_a_stored_configuration_lacks_is_what_was_done_before_it_was_a_setting():
    tuned = build_config("ci", "tuned")
    stored = tuned.to_dict()
    del stored["phase2"]["decay_tokens"], stored["data"]["test_samples"]
    assert config_from_dict(stored) == tuned.replace({"phase2.decay_tokens": 0})


def test_a_stored_setting_that_is_gone_matters_only_where_it_did_something():
    stored = build_config("ci", "tuned").to_dict()
    stored["phase1"]["longest_memory"] = 0.0
    assert config_from_dict(stored) == build_config("ci", "tuned")
    stored["phase1"]["longest_memory"] = 40.0
    with pytest.raises(UserError, match="longest_memory'; allowed"):
        config_from_dict(stored)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preset": "moon"}, "preset is 'moon'; allowed: colab, offline, recall, ci."),
        ({"recipe": "soup"}, "recipe is 'soup'; allowed: published, exact, tuned, look_up."),
        ({"samples": 0}, "data.samples is 0; allowed: 1 or more."),
        ({"samples": -3}, "data.samples is -3; allowed: 1 or more."),
        ({"settings": {"data.samples": "many"}}, "data.samples is 'many'; allowed: a value of type int."),
        ({"settings": {"data.samples": 2.5}}, "data.samples is 2.5; allowed: a value of type int."),
        (
            {"settings": {"phase3.x": "1"}},
            "setting is 'phase3.x'; allowed: concern.field with concern one of",
        ),
        ({"settings": {"phase2.epochs": "1"}}, "allowed: phase2. followed by one of max_epochs"),
        (
            {"settings": {"model.interval": [10, 20]}},
            "model.interval is [10, 20]; allowed: a value of type int.",
        ),
        ({"settings": {"phase2.batch_size": None}}, "batch_size is None; allowed: a value of type int."),
        ({"settings": {"phase1.centroid_weight": "1e300"}}, "allowed: 0 to 1e30."),
        ({"settings": {"data.path": {"a": 1}}}, "data.path is {'a': 1}; allowed: a value of type str."),
        ({"settings": {"model.num_heads": "7"}}, "allowed: a divisor of model.hidden_size (768)."),
        (
            {"recipe": "tuned", "settings": {"phase1.last_tokens": "21"}},
            "phase1.last_tokens is 21; allowed: 0 with longest_mean.",
        ),
        (
            {"recipe": "look_up", "settings": {"phase1.last_tokens": "256"}},
            "phase1.last_tokens is 256; allowed: 2 to 255 with these shapes.",
        ),
        (
            {"recipe": "look_up", "settings": {"model.memory": "gru"}},
            "model.heads is 'look_up'; allowed: drawn, or phase1.last_tokens with model.memory=",
        ),
        (
            {"recipe": "tuned", "settings": {"model.context_dim": "1024"}},
            "model.context_dim is 1024; allowed: with phase1.longest_mean at most model.hidden_size (768).",
        ),
        ({"settings": {"model.interval": "0"}}, "model.interval is 0; allowed: 1 or more."),
        ({"settings": {"model.max_contexts": "0"}}, "model.max_contexts is 0; allowed: 1 or more."),
        ({"settings": {"model.attention_dropout": "1.5"}}, "allowed: 0 to 1."),
        ({"settings": {"runtime.precision": "fp16"}}, "allowed: auto, fp32, bf16."),
        ({"settings": {"model.kv_method": "both"}}, "allowed: fixed, variable."),
        ({"settings": {"phase2.learning_rate": "nan"}}, "allowed: a finite number."),
        ({"settings": {"runtime.seed": 2**63}}, "allowed: whole numbers up to 9223372036854775807."),
        ({"settings": {"data.corpus": "chitchat+own"}}, "which needs data.source=file; allowed: own."),
        ({"settings": {"phase2.learning_rate": "0"}}, "allowed: more than 0, at most 1e30."),
        ({"settings": {"phase1.learning_rate": "3e38"}}, "allowed: more than 0, at most 1e30."),
        (
            {"settings": {"data.source": "file"}},
            "data.source=file and data.path=FILE go together",
        ),
        (
            {"settings": {"data.path": "x.jsonl"}},
            "data.source=file and data.path=FILE go together",
        ),
    ],
)
def test_refusals_say_what_is_allowed(changes, said):
    with pytest.raises(UserError) as refused:
        build_config(**{"preset": "colab", **changes})
    assert said in str(refused.value)


def test_settings_from_the_command_line():
    assert parse_settings(["phase2.patience=2", "data.path=a=b"]) == {
        "phase2.patience": "2",
        "data.path": "a=b",
    }
    with pytest.raises(UserError, match="has no '='"):
        parse_settings(["phase2.patience"])
