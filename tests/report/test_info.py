"""`ctxkv info` and `ctxkv settings`: exact counts, and every setting with its reason."""

from dataclasses import dataclass

import pytest
from torch import nn

from ctxkv_lib.progress import epochs_ahead
from ctxkv_lib.report.info import describe_settings, format_settings
from ctxkv_lib.runs.presets import RECIPES, build_config, usual_epochs

ABOUT = {"preset", "recipe", "plugin", "code"}  # what a configuration has besides settings


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_is_listed_with_its_value_its_reason_and_what_it_allows(recipe):
    rows = describe_settings("ci", recipe)
    settings = build_config("ci", recipe).flat()
    named = {key: value for key, value in settings.items() if key.rpartition(".")[2] not in ABOUT}
    assert {row["setting"]: row["value"] for row in rows} == named
    assert all(row["reason"] and row["allowed"] for row in rows)
    text = format_settings(rows)
    assert "data.samples = 10 conversations" in text
    assert "allowed: 1 or more" in text


class OwnBlock(nn.Module):
    @dataclass
    class Settings:
        gates: int = 3

    def __init__(self, context_dim, hidden_size, settings):
        super().__init__()


def test_settings_of_an_own_part_are_listed_too():
    rows = describe_settings("ci", parts={"block": OwnBlock})
    assert (rows[-1]["setting"], rows[-1]["value"]) == ("block.gates", 3)
    assert "block.gates = 3\n    a setting of your own part" in format_settings(rows)


def test_the_estimate_says_how_many_epochs_are_usual_with_the_settings_of_the_recipe():
    config = build_config("offline")
    words = epochs_ahead(3, 4, 40, usual_epochs(config))
    assert words == "about 3 s per epoch, 4 to 40 epochs; this recipe usually stops after 5 to 9"
    assert usual_epochs(config.replace({"phase2.patience": 2})) is None
    assert usual_epochs(build_config("offline", "tuned")) is None
