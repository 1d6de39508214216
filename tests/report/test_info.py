"""`ctxkv info` and `ctxkv settings`: exact counts, and every setting with its reason."""

import itertools
from dataclasses import dataclass

import pytest
from conftest import PreviousToken
from torch import nn

from ctxkv_lib.progress import epochs_ahead
from ctxkv_lib.report import times
from ctxkv_lib.report.info import describe, describe_settings, format_info, format_settings
from ctxkv_lib.runs.presets import RECIPES, build_config, usual_epochs

ABOUT = {"preset", "recipe", "plugin", "code"}  # what a configuration has besides settings


def test_times_scale_with_the_text_and_a_layer_that_reads_tokens_has_no_phase_1(monkeypatch):
    monkeypatch.setattr(times.time, "perf_counter", itertools.count().__next__)  # a batch takes half a second
    monkeypatch.setattr(times, "EVALUATION_ROWS", 100)
    config = build_config("ci", settings={"phase2.batch_size": 50, "phase1.batch_size": 100})
    time = describe(config, 10_000, 1_000, time=True)["time"]
    assert (time["tokens"], time["epochs"], time["iterations"]) == (10_000, [3, 3], 59)
    assert time["epoch_seconds"] == (200 + 10) / 2
    assert time["iteration_seconds"] == 50  # 100 batches at half a second each
    sampled = describe(config.replace({"phase1.max_tokens": 5_000}), 10_000, 1_000, time=True)["time"]
    assert (sampled["tokens"], sampled["iteration_seconds"]) == (10_000, 25)
    unknown = describe(config.replace({"layer": PreviousToken, "data.source": "ultrachat"}), time=True)
    line = format_info(unknown).splitlines()[-1]
    assert line == "Per 100,000 tokens: about 17 min per epoch, 3 epochs"
    assert "time" not in describe(config)
    untrained = config.replace({"phase1.max_iterations": 0})
    time = describe(untrained, 10_000, 1_000, time=True)["time"]
    assert (time["iterations"], time["iteration_seconds"]) == (0, None)


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
