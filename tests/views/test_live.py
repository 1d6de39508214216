"""`LiveCurves`: what it draws, what it prints, and what its drawing may cost."""

import time
from base64 import b64encode

import pytest
from drawn import Clock, line
from matplotlib.figure import Figure
from sample_runs import EPOCHS, phase1_lines

from ctxkv_lib.experiments import prepare, run
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views.live import FIRST_SECONDS, SHARE, LiveCurves, describe

PNG = b64encode(b"\x89PNG\r\n").decode()[:7]  # how a PNG in a page begins


@pytest.fixture
def epochs(two_runs):
    """Phase 2 lines of metrics.jsonl by number of samples."""
    runs = {100: load_run(two_runs[0]), 500: load_run(two_runs[1])}
    return {n: [line for line in run.metrics if line["stage"] == "phase2"] for n, run in runs.items()}


def test_live_curves_print_lines_outside_a_notebook(capsys, epochs):
    live = LiveCurves()
    for metric in (phase1_lines()[0], *epochs[500][:3]):
        live(metric)
    live({**epochs[500][3], "samples": 500})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Phase 1, iteration 2: loss 5.450, 0% of positions converged"
    assert printed[3] == "Phase 2, epoch 3: train PPL 107.4, val PPL 179.2, val acc 20.4%, best so far"
    assert printed[4].startswith("500 samples, Phase 2, epoch 4")
    assert printed[4].endswith("1 without improvement")
    assert live.figure is None


def test_live_curves_end_with_everything_that_came(epochs):
    live = LiveCurves(stop_rate=0.8, notebook=True)
    before = live.image.value
    for metric in phase1_lines():
        live(metric)
    live.finish()
    rate, _ = live.figure.axes
    assert list(line(rate, "this run").get_xdata()) == list(range(2, 18))
    assert set(line(rate, "stop at 80%").get_ydata()) == {80}
    assert f"base64,{PNG}" in live.image.value
    assert live.image.value != before
    for metric in epochs[500]:
        live(metric)
    live.finish()
    (ax,) = live.figure.axes
    assert list(line(ax, "this run: train").get_ydata()) == [row[0] for row in EPOCHS[500]]
    assert list(line(ax, "this run: validation").get_ydata()) == [row[1] for row in EPOCHS[500]]
    assert "Phase 2, epoch 6" in live.status.value


def test_live_curves_tell_the_runs_of_a_comparison_apart(epochs):
    live = LiveCurves(notebook=True)
    for samples in (100, 500):
        for metric in epochs[samples]:
            live({**metric, "samples": samples})
    live.finish()
    (ax,) = live.figure.axes
    assert list(line(ax, "100 samples: validation").get_ydata()) == [row[1] for row in EPOCHS[100]]
    assert list(line(ax, "500 samples: validation").get_ydata()) == [row[1] for row in EPOCHS[500]]


def test_drawing_costs_less_than_its_share(monkeypatch):
    clock, drawn = Clock(), []

    def slow_drawing(self):
        clock.now += 0.5
        drawn.append(clock.now)
        return Figure()

    monkeypatch.setattr(LiveCurves, "_drawing", slow_drawing)
    live = LiveCurves(notebook=True, clock=clock)
    drawn.clear()
    began = clock.now
    for iteration in range(2, 1200):
        live({**phase1_lines()[0], "iteration": iteration})
        clock.now += 0.1
        assert 0.5 * len(drawn) <= FIRST_SECONDS + SHARE * (clock.now - began)
    assert len(drawn) == 8  # four at once, then one every 25 s, in 122 s


def test_a_real_drawing_is_counted():
    live = LiveCurves(notebook=True)
    live(phase1_lines()[0])
    first = live.figure
    began = time.perf_counter()
    live._draw()
    cost = time.perf_counter() - began
    assert live.spent > cost / 10
    assert [ax.get_ylabel() for ax in first.axes] == ["Converged positions (%)", "Loss (no unit, log scale)"]
    spent, second = live.spent, live.figure
    live(phase1_lines()[1])
    assert live.figure is second  # too early for another
    assert live.spent == spent


def test_a_training_is_followed_and_resumed(tiny_config, tmp_path):
    first = LiveCurves(notebook=True)
    prepare(tiny_config, tmp_path / "run", first)
    first.finish()
    assert len(first.figure.axes) == 2
    second = LiveCurves(notebook=True)
    finished = run(tiny_config, tmp_path / "run", second)
    second.finish()
    assert list(second._lines["phase1"]["this run"]) == finished.phase1
    vals = [each["val_ppl"] for each in finished.summary["phase2"]["epochs"]]
    assert list(line(second.figure.axes[0], "this run: validation").get_ydata()) == vals


def test_describe_names_stage_and_step():
    assert describe(phase1_lines()[-1]).startswith("Phase 1, iteration 17: loss")
