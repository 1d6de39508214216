import dataclasses

import pytest

from ctxkv_lib.report.settings import describe_settings
from ctxkv_lib.report.terminal import format_settings
from ctxkv_lib.runs.config import GROUPS, PRESETS, RECIPES, build_config, flat


def test_every_setting_is_listed_with_its_reason_and_what_it_allows():
    rows = describe_settings()
    fields = [(c, f) for c, settings in GROUPS.items() for f in dataclasses.fields(settings)]
    assert [row["setting"] for row in rows] == [f"{concern}.{known.name}" for concern, known in fields]
    assert [row["value"] for row in rows] == [known.default for _, known in fields]
    for row in rows:
        assert row["reason"], row["setting"]
        assert row["allowed"]
    text = format_settings(rows)
    assert "data.samples = 500 conversations" in text
    assert "with offline: 50, ci: " in text
    assert "exact: exact recurrence" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_listed_with_the_settings_of_its_plug_ins(recipe, printed_by):
    settings = dict(flat(build_config("ci", recipe).to_dict()))
    rows = printed_by("settings", "--preset", "ci", "--recipe", recipe, "--json")
    assert {row["setting"]: row["value"] for row in rows} == {
        key: value for key, value in settings.items() if "." in key and not key.endswith(".plugin")
    }
    assert ("attention.layer_dropout = 0.1" in printed_by("settings", "--recipe", recipe)) == (
        recipe == "tuned"
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", [None, "tuned"])
def test_a_preset_is_listed_with_its_own_values_and_all_presets_that_differ(preset, recipe, printed_by):
    own = build_config(preset, recipe)
    values = {name: dict(flat(build_config(name, own.recipe).to_dict())) for name in PRESETS}
    rows = printed_by("settings", "--preset", preset, "--recipe", own.recipe, "--json")
    assert recipe or rows == printed_by("settings", "--preset", preset, "--json")
    for row in rows:
        here = {name: each[row["setting"]] for name, each in values.items()}
        assert row["value"] == here[preset]
        named = {name: value for name, value in row["elsewhere"].items() if name in PRESETS}
        assert named == {name: value for name, value in here.items() if value != here[preset]}
