"""The form in a notebook builds the right configuration."""

import sys
from types import ModuleType

import pytest

from ctxkv_lib import __version__
from ctxkv_lib.views.notebook import notebook_config, session


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("PRESET", "SAMPLES", "RECIPE", "SEED"):
        monkeypatch.delenv(f"CTXKV_{name}", raising=False)


def test_an_empty_form_uses_the_values_of_the_preset(monkeypatch):
    config = notebook_config()
    assert (config.preset, config.recipe, config.data.samples) == ("offline", "exact", 50)
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    assert notebook_config("", "", "", "").preset == "colab"
    chosen = notebook_config("offline", "20", "published", 0, {"phase2.max_epochs": 2})
    assert (chosen.data.samples, chosen.recipe, chosen.runtime.seed) == (20, "published", 0)
    assert chosen.phase2.max_epochs == 2


def test_the_environment_overrides_the_form_and_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CTXKV_PRESET", "ci")
    monkeypatch.setenv("CTXKV_SEED", "5")
    config = notebook_config("offline", seed="")
    assert (config.preset, config.runtime.seed) == ("ci", 5)
    assert capsys.readouterr().out == "preset is ci instead of offline, because CTXKV_PRESET is set.\n"


def test_the_first_cell_says_where_it_runs_and_how_to_get_a_gpu(monkeypatch):
    line = f"ctxkv_lib {__version__} on cpu, preset offline: 3 minutes on 2 CPU cores"
    assert session("3 minutes") == line
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    assert "preset colab" in session("3 minutes")
    assert "Runtime > Change runtime type" in session("3 minutes")
    monkeypatch.setenv("CTXKV_PRESET", "ci")
    assert session("3 minutes").endswith("preset ci: a few seconds")
