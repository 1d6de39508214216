import dataclasses
import shlex
from pathlib import Path

import pytest

from ctxkv_lib.errors import UserError
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.runs.config import PRESETS, RECIPES, build_config, config_from_dict, parse_settings
from ctxkv_lib.runs.configure import run_command
from ctxkv_lib.runs.settings import Sampling


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_config_survives_its_dictionary(preset, recipe):
    config = build_config(preset, recipe, settings={"phase2.batch_size": "64"})
    assert config_from_dict(config.to_dict()) == config
    assert config.phase2.batch_size == 64


def test_published_settings_are_the_defaults_of_colab_and_exact_differs_in_contexts_and_precision():
    config = build_config("colab")
    assert (config.recipe, config.data.samples, config.phase1.context_method) == ("published", 500, "passes")
    assert (config.model, config.model.context_window) == (ModelConfig(), 640)
    published, exact = build_config("colab", "published"), build_config("colab", "exact")
    assert published.runtime.precision == "fp32"  # as published
    same = exact.replace({"phase1.context_method": "passes", "runtime.precision": "fp32"})
    assert dataclasses.replace(same, recipe="published") == published


def test_a_setting_that_a_stored_configuration_lacks_has_its_default():
    stored = build_config("ci", "exact").to_dict()
    del stored["phase2"]["patience"]
    assert config_from_dict(stored) == build_config("ci", "exact")
    for name in ("preset", "recipe"):
        with pytest.raises(UserError, match=f"{name} is 'moon'; allowed"):
            config_from_dict({**stored, name: "moon"})


def test_a_plug_in_has_its_own_settings():
    tuned = build_config("offline", "tuned", settings={"attention.copy_weight": 0.2})
    assert tuned.plugins["attention"].settings["copy_weight"] == 0.2
    assert tuned.plugins["attention"].settings["layer_dropout"] == 0.1
    plain = tuned.replace({"attention": "none", "block": "None"})
    assert plain.plugins == {}
    mixed = tuned.replace({"mixer": GRU, "mixer.input_dropout": 0.1})
    assert set(mixed.plugins) == {"mixer"}
    assert config_from_dict(mixed.to_dict()) == mixed
    with pytest.raises(UserError, match="loss does not go with it"):
        mixed.replace({"loss": "ctxkv_lib.method.oacd:oacd_loss"})
    with pytest.raises(UserError, match=r"loss\.x is set, but .*:oacd_loss has no settings; "):
        build_config("colab", settings={"loss": "ctxkv_lib.method.oacd:oacd_loss", "loss.x": "1"})
    for key, value, said in (
        ("attention.copy_weight", "1", r"copy_weight is 1\.0; allowed: 0 or more, less than 1\."),
        ("block.speed", "1", r"allowed: block\. followed by one of longest_mean"),
    ):
        with pytest.raises(UserError, match=said):
            build_config("colab", "tuned", settings={key: value})


def test_the_command_of_a_run_makes_its_configuration_and_settings_are_cut_at_their_first_sign():
    changed = {"mixer": GRU, "mixer.input_dropout": 0.1, "phase2.patience": 5, "data.source": "chitchat"}
    config = build_config("colab", "tuned", 20, changed)  # the recipe's block and attention are gone
    words = shlex.split(run_command(config, Path("runs/own")))
    given = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    assert build_config("colab", "tuned", 20, parse_settings(given)) == config
    fewer = build_config("colab", "tuned", settings={"block": None})
    assert "block=None" in shlex.split(run_command(fewer, Path("runs/own")))
    assert shlex.split(run_command(fewer, Path("-own")))[-2:] == ["--out", "./-own"]  # no option
    read = parse_settings(["phase2.patience=2", "data.path=a=b"])
    assert read == {"phase2.patience": "2", "data.path": "a=b"}


GRU = "own_parts:GRUMixer"
TOGETHER = "data.source=file and data.path=FILE go together"
REFUSED = [
    ("preset", "moon", "preset is 'moon'; allowed: colab, offline, ci."),
    ("recipe", "soup", "recipe is 'soup'; allowed: published, exact, tuned."),
    ("recipe", "", "recipe is ''; allowed: published, exact"),
    ("samples", 0, "data.samples is 0; allowed: 1 or more."),
    ("data.samples", "many", "data.samples is 'many'; allowed: a value of type int."),
    ("data.samples", 2.5, "data.samples is 2.5; allowed: a value of type int."),
    ("phase3.x", "1", "setting is 'phase3.x'; allowed: group.field with group one of"),
    ("phase2.epochs", "1", "allowed: phase2. followed by one of max_epochs"),
    ("phase2.batch_size", None, "batch_size is None; allowed: a value of type int."),
    ("phase1.centroid_weight", "1e300", "allowed: 0 to 1e30."),
    ("data.path", {"a": 1}, "data.path is {'a': 1}; allowed: a value of type str."),
    ("model.num_heads", "7", "allowed: a divisor of model.hidden_size (768)."),
    ("attention.copy_weight", "0.1", "there is none; give one with attention=module:Name."),
    ("block", "", "'' names no plug-in; write package.module:Name."),
    ("block", "nowhere:Block", "nowhere:Block cannot be loaded"),
    ("loss", "math:pi", "An object of type float is no plug-in; give a class or a function"),
    ("model.interval", "0", "model.interval is 0; allowed: 1 or more."),
    ("model.max_contexts", "0", "model.max_contexts is 0; allowed: 1 or more."),
    ("model.attention_dropout", "1.5", "allowed: 0 to 1."),
    ("runtime.precision", "fp16", "allowed: auto, fp32, bf16."),
    ("model.kv_method", "both", "allowed: fixed, variable."),
    ("phase2.learning_rate", "nan", "allowed: a finite number."),
    ("runtime.seed", 2**63, "allowed: whole numbers up to 9223372036854775807."),
    ("data.corpus", "chitchat+own", "which needs data.source=file; allowed: own."),
    ("phase2.learning_rate", "0", "allowed: more than 0, at most 1e30."),
    ("phase1.learning_rate", "3e38", "allowed: more than 0, at most 1e30."),
    ("data.source", "moon", "data.source is 'moon'; allowed: ultrachat, file, chitchat."),
    ("data.source", "file", TOGETHER),
    ("data.path", "x.jsonl", TOGETHER),
    ("data.path", "", "data.path is ''; allowed: a path, in UTF-8."),
    ("data.path", "~a\0b", "allowed: a path, in UTF-8."),
    ("data.columns", "te\udcff", "allowed: names of fields, in UTF-8."),
    ("data.columns", "a", "data.columns is 'a'; allowed: none but with data.source=file"),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", None), ("temperature", "1"), ("top_k", 1.5), ("seed", None), ("seed", 1.5)],
)
def test_values_of_sampling_that_are_no_such_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"sampling.{name} is {value!r}; allowed: "):
        Sampling(**{name: value})


@pytest.mark.parametrize(("name", "value", "said"), REFUSED)
def test_refusals_say_what_is_allowed(name, value, said):
    is_setting = name not in ("preset", "recipe", "samples")
    with pytest.raises(UserError) as refused:
        build_config(**{"preset": "colab", **({"settings": {name: value}} if is_setting else {name: value})})
    assert said in str(refused.value)
