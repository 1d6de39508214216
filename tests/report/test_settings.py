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
    assert "with offline: 50, recall: " in text
    assert "grid: on multiples of the interval" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_listed_with_the_settings_of_its_plug_ins(recipe, printed_by):
    settings = dict(flat(build_config("ci", recipe).to_dict()))
    rows = printed_by("settings", "--preset", "ci", "--recipe", recipe, "--json")
    assert {row["setting"]: row["value"] for row in rows} == {
        key: value for key, value in settings.items() if "." in key and not key.endswith(".plugin")
    }
    assert ("optimizer.decayed = matrices" in printed_by("settings", "--recipe", recipe)) == (
        recipe == "tuned"
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_listed_with_its_own_values(preset, printed_by):
    config = build_config(preset)
    for row in printed_by("settings", "--preset", preset, "--json"):
        concern, name = row["setting"].split(".")
        assert row["value"] == getattr(getattr(config, concern), name)
        for other in row["elsewhere"].keys() & PRESETS.keys():
            assert row["elsewhere"][other] != row["value"]
            assert row["elsewhere"][other] == getattr(
                getattr(build_config(other, config.recipe), concern), name
            )


def test_presets_that_differ_from_the_one_that_is_listed_are_named(printed_by):
    rows = {row["setting"]: row["elsewhere"] for row in printed_by("settings", "--preset", "ci", "--json")}
    assert {name: rows["data.source"][name] for name in ("colab", "recall")} == {
        "colab": "ultrachat",
        "recall": "recall",
    }
    assert rows["model.hidden_size"]["offline"] == 768
    tuned = printed_by("settings", "--preset", "ci", "--recipe", "tuned", "--json")
    (epochs,) = [row for row in tuned if row["setting"] == "phase2.max_epochs"]
    assert "ci" not in epochs["elsewhere"]
