"""Whole runs of what contexts are compared with: mixers, and blocks that nothing trains."""

import re

import pytest
import torch
from conftest import local_experiment

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.measure.measure import measure
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.models import shapes
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.runs.trained import load_trained
from ctxkv_lib.views.explore import attention_by_slot, open_run

SETTINGS = {"untrained": {"phase1.max_iterations": 0}, "mixer": {"mixer": "own_parts:GRUMixer"}}


@pytest.fixture(scope="module", params=SETTINGS)
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    settings = {**local_experiment(folder), "phase2.max_epochs": 2, **SETTINGS[request.param]}
    return run(build_config("ci", samples=8, settings=settings), folder / "run")


@pytest.mark.slow
def test_a_baseline_goes_through_the_same_stages_and_is_served_or_refused_in_a_sentence(finished, printed_by):
    summary, has_mixer = finished.summary, "mixer" in finished.config.plugins
    assert load_run(finished.path).summary == summary
    assert summary["parameters"] == shapes(finished.config)[0]
    assert summary["phase1"]["stop_reason"] == "untrained"
    assert not finished.phase1
    first, second = summary["phase2"]["epochs"]
    assert second["train_ppl"] < first["train_ppl"]
    assert summary["test"]["ppl"] > 1
    report = (finished.path / "report.md").read_text()
    assert ("instead of contexts" in report) == has_mixer
    assert ("### Context window" in report) != has_mixer
    assert "phase1.png" not in report
    assert not re.search(r"(?m)^\|[^|]+(\| – )+\|$", report)  # a row without a number
    assert ("2. **More data**" in report) != has_mixer  # the first of other proposals is a longer interval
    for figure in finished.path.glob("figures/*.png"):
        assert figure.name in report
    mixer = finished.config.plugins.get("mixer")
    if mixer is None:
        model, tokenizer = load_trained(finished.path, torch.device("cpu"))
        assert model.generate(
            tokenizer("the cat", return_tensors="pt")["input_ids"], max_new_tokens=3
        ).numel()
    else:
        said = printed_by("generate", finished.path, "--prompt", "the cat", code=2)
        assert f"has a mixer ({mixer.name})" in said
    if mixer:
        with pytest.raises(UserError, match="has a mixer instead of contexts to probe"):
            measure(finished, ["probe"])
        with pytest.raises(UserError, match="returns no attention weights to look at"):
            attention_by_slot(open_run(finished))
