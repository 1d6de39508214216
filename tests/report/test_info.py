"""`ctxkv info` and `ctxkv settings`: exact counts, and every setting with its reason."""

import dataclasses

import pytest

from ctxkv_lib.report.info import describe_settings, format_settings
from ctxkv_lib.runs.config import GROUPS, flat
from ctxkv_lib.runs.presets import RECIPES, build_config


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
        key: value
        for key, value in settings.items()
        if "." in key and not key.endswith((".plugin", "block.source", "attention.source"))
    }
