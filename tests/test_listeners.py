"""The listeners in `docs/start.md` log the metrics that a run sends them."""

import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from conftest import TOP
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctxkv_lib.experiments import run

PAGE = (TOP / "docs" / "start.md").read_text(encoding="utf-8")
*_, TENSORBOARD, WANDB = re.findall(r"(?s)```python\n(.*?)```", PAGE)


@pytest.fixture
def execute(finished_run, tmp_path, monkeypatch):
    """Return a function that executes code from the page on a finished run and returns the run's metrics."""
    monkeypatch.chdir(tmp_path)
    reused = SimpleNamespace(run=lambda config, listener: run(config, finished_run.path, listener))

    def execute_code(code):
        exec(code, {"ctxkv": reused, "config": finished_run.config})
        return [{**line, "replayed": True} for line in finished_run.metrics]

    return execute_code


def test_tensorboard_has_the_numbers_of_both_phases(execute):
    metrics = execute(TENSORBOARD)
    events = EventAccumulator("runs/tensorboard").Reload()
    for stage, name, step in (("phase1", "loss", "iteration"), ("phase2", "val_ppl", "epoch")):
        logged = [(event.step, event.value) for event in events.Scalars(f"{stage}/{name}")]
        expected = [(line[step], line[name]) for line in metrics if line["stage"] == stage]
        assert logged == [(at, pytest.approx(value)) for at, value in expected]


def test_wandb_gets_every_line(execute, monkeypatch):
    """A stand-in replaces wandb, which is not installed for tests."""
    lines = []
    wandb = SimpleNamespace(init=lambda project, config: nullcontext(SimpleNamespace(log=lines.append)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert execute(WANDB) == lines
