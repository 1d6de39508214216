"""`LiveCurves` prints lines outside notebooks; in a notebook, it redraws one figure every few seconds."""

from types import SimpleNamespace
from unittest.mock import Mock

import nbformat
import pytest
from nbclient import NotebookClient
from sample_runs import EPOCHS, epoch_lines, phase1_lines

from ctxkv_lib.views import live as module
from ctxkv_lib.views.live import LiveCurves

EPOCH_LINES = epoch_lines(EPOCHS[500])
STEP = {"stage": "phase2", "epoch": 1, "step": 50, "steps": 1148, "loss": 9.0, "learning_rate": 1e-3}
NOTEBOOK = """
import sys
sys.path.insert(0, {tests!r})
from sample_runs import phase1_lines, sample_run
from ctxkv_lib.views.figures import ppl_curves
from ctxkv_lib.views.live import LiveCurves
---
live = LiveCurves()
for line in phase1_lines():
    live(line)
---
ppl_curves({{"this run": sample_run().summary}})
"""


@pytest.fixture
def live(monkeypatch):
    """Return `LiveCurves` as in a notebook, but keep all drawings, and let the test set the clock."""
    view = LiveCurves(stop_rate=0.8)
    view.shown, view.now = [], SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(module, "in_notebook", lambda: True)
    monkeypatch.setattr(module.time, "monotonic", lambda: view.now.seconds)
    view._place = SimpleNamespace(update=view.shown.append)
    return view


def test_live_curves_print_lines_outside_a_notebook(capsys):
    live = LiveCurves()
    for metric in (phase1_lines()[0], STEP, EPOCH_LINES[2], {**EPOCH_LINES[3], "samples": 500}):
        live(metric)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "Phase 1, iteration 2: loss 5.450, 0% of positions converged",
        "Phase 2, epoch 3: train PPL 107.4, val PPL 179.2, val acc 20.4%, best so far",
        "500 samples, Phase 2, epoch 4: train PPL 60.9, val PPL 186.5, val acc 20.3%, "
        "epochs without improvement: 1",
    ]


def test_a_stage_is_drawn_at_once_then_every_few_seconds_and_at_the_end(live, monkeypatch):
    for line in phase1_lines():
        live(line)
    assert len(live.shown) == 1
    assert live.shown[0].axes[0].get_lines()[-1].get_ydata()[0] == 80  # percent; Phase 1 stops there
    live.now.seconds += module.DRAW_SECONDS / 2
    live(EPOCH_LINES[0])
    assert len(live.shown) == 2
    live(EPOCH_LINES[1])
    assert len(live.shown) == 2
    live.now.seconds += module.DRAW_SECONDS
    live(EPOCH_LINES[2])
    assert len(live.shown) == 3
    assert "epoch 1: train PPL 571.3" in live.shown[1]._suptitle.get_text()
    live(EPOCH_LINES[3])
    monkeypatch.setattr("IPython.get_ipython", Mock())
    live.finish()  # at the end of the cell
    assert "epoch 4: train PPL 60.9" in live.shown[3]._suptitle.get_text()


def test_the_training_loss_is_drawn_until_the_first_epoch_has_ended(live):
    for step in (50, 100):
        live({**STEP, "step": step, "loss": 10 - step / 50})
    (ax,) = live.figure().axes
    assert [line.get_xydata().tolist() for line in ax.get_lines()] == [[[50, 9], [100, 8]]]
    assert live.shown[0]._suptitle.get_text() == "Phase 2, epoch 1, step 50 of 1,148: training loss 9.000"
    live(EPOCH_LINES[0])
    live({**STEP, "epoch": 2})
    assert live.figure().axes[0].get_title(loc="left") == "Perplexity per token (log scale)"
    live({**STEP, "samples": 500})  # another run begins
    assert len(live.figure().axes[0].get_lines()) == 2
    live(STEP)  # the first run begins again
    assert [len(line.get_xdata()) for line in live.figure().axes[0].get_lines()] == [1, 1]


def test_runs_of_a_comparison_have_a_curve_each_and_a_run_that_begins_again_replaces_its_own(live):
    for samples in (100, 500):
        for line in EPOCH_LINES[:3]:
            live({**line, "samples": samples})
    (ax,) = live.figure().axes
    assert [len(line.get_xdata()) for line in ax.get_lines()] == [3, 3, 1, 3, 3, 1]
    assert ax.get_lines()[2].get_xdata() == [3]  # the best so far
    for _ in range(2):  # even if it stops after its first epoch
        live({**EPOCH_LINES[0], "samples": 500})
        assert len(live.figure().axes[0].get_lines()[-2].get_xdata()) == 1


@pytest.mark.slow
def test_a_notebook_shows_each_figure_once_and_keeps_pictures_where_there_are_no_widgets(pytestconfig):
    """The last drawing is kept below the training cell."""
    source = NOTEBOOK.format(tests=str(pytestconfig.rootpath / "tests"))
    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in source.split("---")]
    notebook = NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert [len(each) for each in outputs] == [0, 1, 1]
    assert all({*each[0]["data"]} == {"image/png", "text/plain"} for each in outputs[1:])
