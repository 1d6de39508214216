"""The live view between two metrics: short stages are seen, a bar moves, runs are counted."""

import pytest
from drawn import Clock
from matplotlib.figure import Figure
from sample_runs import phase1_lines, sample_run

from ctxkv_lib import progress
from ctxkv_lib.experiments import run
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views.live import FIRST_SECONDS, LiveCurves


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def live(clock):
    view = LiveCurves(stop_rate=0.9, runs=2, notebook=True, clock=clock)
    yield view
    view.finish()


@pytest.fixture
def epochs(tmp_path):
    return [line for line in load_run(sample_run(tmp_path / "run")).metrics if line["stage"] == "phase2"]


def shown(live):
    return len(live.figure.axes[0].get_lines()[0].get_xdata())


def test_phase_1_is_drawn_while_it_runs_and_whole_before_phase_2(live, clock):
    for line in phase1_lines():
        live(line)
        clock.now += 0.02  # all of it in a third of a second
    assert shown(live) == 1
    live.step("Phase 2, epoch 1", 0, 10)
    assert shown(live) == len(phase1_lines())


def test_each_stage_may_draw_at_once_but_no_more_than_its_share(live, clock, monkeypatch, epochs):
    drawn = []

    def slow_drawing(self):
        clock.now += 0.4
        drawn.append(self._stage)
        return Figure()

    monkeypatch.setattr(LiveCurves, "_drawing", slow_drawing)
    for line in [*phase1_lines(), *epochs]:
        live(line)
        live.step(f"after {line}", 0, 1)
    assert 0 < drawn.count("phase1") * 0.4 <= FIRST_SECONDS
    assert 0 < drawn.count("phase2") * 0.4 <= FIRST_SECONDS + 0.4


def test_the_bar_says_how_far_a_loop_is_and_what_is_left(live, clock):
    live.step("Validation", 0, 40)
    assert live.left.value == "Validation: 0%"
    clock.now += 30
    live.step("Validation", 10, 40)
    assert live.bar.value == 0.25
    assert live.left.value == "Validation: 25%, up to 1 min 30 s left"
    clock.now += 0.01
    live.step("Validation", 11, 40)
    assert live.bar.value == 0.25  # too early to look again


def test_the_runs_of_a_comparison_are_counted(live, clock, epochs):
    told = []
    for samples in (100, 500):
        for line in (phase1_lines()[0], epochs[0]):
            live({**line, "samples": samples})
            told.append((live.overall.description, live.overall.value))
            clock.now += 1
    assert told == [("Run 1 of 2", 0), ("Run 1 of 2", 0.5), ("Run 2 of 2", 1), ("Run 2 of 2", 1.5)]


def test_what_is_drawn_meanwhile_has_whole_epochs_and_all_its_labels(live, epochs):
    for line in epochs[:2]:
        live(line)
    live.step("Phase 2, epoch 3", 0, 10)
    (ax,) = live.figure.axes
    assert [tick for tick in ax.get_xticks() if 1 <= tick <= 2] == [1, 2]
    page = live.figure.bbox
    for label in (*ax.get_yticklabels(), ax.yaxis.label):
        assert page.x0 <= label.get_window_extent().x0, label


def test_a_real_training_moves_the_bar_through_epochs_and_validations(tiny_config, tmp_path):
    heard = []
    live = LiveCurves(notebook=True)
    progress.watchers.append(lambda *step: heard.append(step))
    try:
        run(tiny_config, tmp_path / "run", live)
    finally:
        live.finish()
        progress.watchers.clear()
    loops = list(dict.fromkeys(name for name, _, _ in heard))
    assert "Phase 1" in loops
    assert any("epoch 1" in name for name in loops)
    assert "Validation" in loops
    assert all(0 <= done <= total for _, done, total in heard)
    assert live.bar.value > 0


def test_a_view_that_ended_is_not_told_of_other_trainings():
    live = LiveCurves(notebook=True)
    assert live.step in progress.watchers
    live.finish()
    assert progress.watchers == []
    assert list(progress.progress_bar([1, 2], "anything")) == [1, 2]
