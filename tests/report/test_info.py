"""`ctxkv info` and `ctxkv settings`: exact counts, and every setting with its reason."""

import dataclasses

import pytest

from ctxkv_lib.errors import UserError
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.report.info import dense_fp32_mib, describe, describe_settings, format_info, format_settings
from ctxkv_lib.runs.config import GROUPS, RECIPES, build_config, flat


def test_the_original_s_sizes_are_exact():
    sizes = describe(build_config("colab"))
    assert sizes["parameters"] == {"total": 45_163_264, "trainable_phase2": 6_301_440}
    assert (sizes["train_tokens"], sizes["val_tokens"]) == (587_970, 22_723)
    assert sizes["context_window"]["theoretical_max"] == 29_399
    assert sizes["kv_cache"]["contexts"] == 621
    assert [round(size) for size in sizes["caches_dense_fp32_mib"].values()] == [574, 1723, 22, 67, 2386]
    assert sizes["caches_dense_fp32_mib"] == dense_fp32_mib(587_970, 22_723, ModelConfig())
    text = format_info(sizes)
    for shown in ("45,163,264", "6,301,440 (13.95%)", "0, 20, 40, …, 620", "2,385.5", "621 contexts"):
        assert shown in text


def test_other_data_has_sizes_once_its_tokens_are_given():
    config = build_config("offline")
    assert "caches_dense_fp32_mib" not in describe(config)
    sizes = describe(config, 90_000, 9_000)
    assert sizes["caches_dense_fp32_mib"] == dense_fp32_mib(90_000, 9_000, config.model)
    assert "90,000" in format_info(sizes)
    with pytest.raises(UserError, match="--val-tokens is 0; allowed: 1 or more"):
        describe(config, 90_000, 0)


def test_info_refuses_what_run_refuses():
    with pytest.raises(UserError, match=r"model\.hidden_size is 512"):
        describe(build_config("colab", settings={"model.hidden_size": 512}), 587_970, 640)


def test_every_setting_is_listed_with_its_reason_and_what_it_allows():
    rows = describe_settings()
    fields = [(group, known) for group, settings in GROUPS.items() for known in dataclasses.fields(settings)]
    assert [row["setting"] for row in rows] == [f"{group}.{known.name}" for group, known in fields]
    values = dict(flat(build_config("colab").to_dict()))
    assert [row["value"] for row in rows] == [values[row["setting"]] for row in rows]
    assert all(row["reason"] and row["allowed"] for row in rows)
    text = format_settings(rows)
    assert "data.samples = 500 conversations" in text
    assert "allowed: 1 or more" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_listed_with_the_settings_of_its_plug_ins(recipe):
    settings = dict(flat(build_config("ci", recipe).to_dict()))
    rows = {row["setting"]: row["value"] for row in describe_settings("ci", recipe)}
    assert rows == {
        key: value for key, value in settings.items() if "." in key and not key.endswith(".plugin")
    }
