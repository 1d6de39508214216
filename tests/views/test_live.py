"""`LiveCurves`: what it draws and prints, what moves between two metrics, and what its drawing may cost."""

import re
from types import SimpleNamespace

import pytest
from drawn import Clock, line
from matplotlib.figure import Figure
from sample_runs import EPOCHS, epoch_lines, phase1_lines

from ctxkv_lib import progress
from ctxkv_lib.experiments import prepare, run
from ctxkv_lib.views.live import SHARE, LiveCurves


@pytest.fixture
def epochs():
    """Phase 2 lines of metrics.jsonl by number of samples."""
    return {n: [{"stage": "phase2", **line} for line in epoch_lines(rows)] for n, rows in EPOCHS.items()}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def live(clock):
    view = LiveCurves(stop_rate=0.8, runs=2, notebook=True, clock=clock)
    yield view
    view.finish()


@pytest.fixture
def slow_drawings(monkeypatch, clock):
    """Stage and last status of all drawings, each of which takes 0.5 s."""
    drawn = []

    def slow_drawing(self):
        clock.now += 0.5
        drawn.append((self._stage, self.status.value))
        return Figure()

    monkeypatch.setattr(LiveCurves, "_drawing", slow_drawing)
    return drawn


def test_it_prints_lines_outside_a_notebook(capsys, epochs):
    live = LiveCurves()
    for metric in (phase1_lines()[0], *epochs[500][:3]):
        live(metric)
    for samples in (500, 1):
        live({**epochs[500][3], "samples": samples})
    live.finish()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Phase 1, iteration 2: loss 5.450, 0% of positions converged"
    assert printed[3] == "Phase 2, epoch 3: train PPL 107.4, val PPL 179.2, val acc 20.4%, best so far"
    assert printed[4].startswith("500 samples, Phase 2, epoch 4")
    assert printed[4].endswith("1 without improvement")
    assert printed[5].startswith("1 sample, ")
    assert live.figure is None


def test_it_ends_with_every_metric(live):
    before = live.image.value
    for metric in phase1_lines():
        live(metric)
    live.finish()
    rate, _ = live.figure.axes
    assert list(line(rate, "this run").get_xdata()) == list(range(2, 18))
    assert set(line(rate, "stop at 80%").get_ydata()) == {80}
    assert "data:image/png" in live.image.value
    assert live.image.value != before


def test_a_second_call_begins_its_curves_anew(live, epochs):
    for _ in range(2):
        for metric in epochs[500]:
            live(metric)
    live.finish()
    drawn = line(live.figure.axes[0], "this run: validation").get_xdata()
    assert list(drawn) == [metric["epoch"] for metric in epochs[500]]
    assert list(line(live.figure.axes[0], "this run: best epoch").get_xdata()) == [3]


def test_runs_of_a_comparison_have_their_own_curves_and_are_counted(live, clock, epochs):
    status = []
    for samples in (100, 500):
        for metric in (phase1_lines()[0], *epochs[samples]):
            live({**metric, "samples": samples})
            clock.now += 1
        status.append(live.status.value.partition(",")[0])
    (ax,) = live.figure.axes
    for samples in (100, 500):
        drawn = list(line(ax, f"{samples} samples: validation").get_ydata())
        assert drawn == [row[1] for row in EPOCHS[samples]]
    assert status == ["Run 1 of 2. 100 samples", "Run 2 of 2. 500 samples"]


def test_drawing_costs_less_than_its_share_and_each_stage_is_drawn_at_once(
    live, clock, slow_drawings, epochs
):
    began = clock.now
    for iteration in range(2, 1200):
        live({**phase1_lines()[0], "iteration": iteration})
        clock.now += 0.1
        assert 0.5 * (len(slow_drawings) - 1) <= SHARE * (clock.now - began)
    assert len(slow_drawings) == 12  # one at once, then one every 10.5 s, in 126 s
    for metric in epochs[100]:
        live(metric)
        live.step("Phase 2", 0, 1)
    assert [stage for stage, _ in slow_drawings].count("phase2") == 1


def test_status_bar_and_figure_show_the_same_epoch(live, clock, slow_drawings, epochs):
    """However fast epochs pass: when the curves must wait, the other two wait with them."""
    for number in range(1, 200):
        live.step(f"Phase 2, epoch {number}", 0, 10)
        if live.status.value != "Reading conversations and token table ...":
            (shown,) = re.findall(r"epoch (\d+): train", live.status.value)
            (computed,) = re.findall(r"epoch (\d+):", live.bar.value)
            assert int(computed) == int(shown) + 1
            assert slow_drawings[-1] == ("phase2", live.status.value)
        live.step(f"Phase 2, epoch {number}", 9, 10)
        live({**epochs[100][0], "epoch": number})
        clock.now += 0.1
    assert 1 < len(slow_drawings) < 4


def test_the_end_of_a_stage_is_shown_at_once_and_then_what_is_computed(live, clock, epochs):
    """Also where Phase 1 took a third of a second, and before work that has no steps to count."""
    for metric in phase1_lines():
        live(metric)
        clock.now += 0.02
    assert "iteration 2:" in live.status.value
    live.step("Phase 2, epoch 1", 0, 10)
    assert "iteration 17:" in live.status.value
    assert len(live.figure.axes[0].get_lines()[0].get_xdata()) == len(phase1_lines())
    for number, metric in enumerate(epochs[100]):
        live.step("Validation", 40, 40)
        live(metric)
        clock.now += 0.02 * number
    with progress.stage("Scoring the test split"):
        assert "epoch 6:" in live.status.value
        assert live.bar.value == "<pre>Scoring the test split ...</pre>"


def test_the_bar_shows_how_far_a_loop_is_and_the_time_left(live, clock):
    live.step("Validation", 0, 40)
    clock.now += 30
    live.step("Validation", 10, 40)
    bar = live.bar.value
    assert "Validation:  25%" in bar
    assert "10/40 [00:30&lt;01:30" in bar
    clock.now += 0.01
    live.step("Validation", 11, 40)
    assert live.bar.value == bar  # too early for another
    live.step("Phase 2, epoch 1", 20, 40)  # a resumed loop
    clock.now += 10
    live.step("Phase 2, epoch 1", 30, 40)
    assert "[00:10&lt;00:10" in live.bar.value


def test_ticks_are_whole_epochs_and_labels_are_on_the_page(live, epochs):
    for metric in epochs[500][:2]:
        live(metric)
    live.finish()
    (ax,) = live.figure.axes
    assert [tick for tick in ax.get_xticks() if 1 <= tick <= 2] == [1, 2]
    page = live.figure.bbox
    for label in (*ax.get_yticklabels(), ax.yaxis.label):
        assert page.x0 <= label.get_window_extent().x0, label


def test_a_training_is_followed_and_resumed(tiny_config, tmp_path):
    heard = []
    first = LiveCurves(notebook=True)
    progress.watchers.append(lambda *step: heard.append(step))
    try:
        prepare(tiny_config, tmp_path / "run", first)
        first.finish()
        assert len(first.figure.axes) == 2
        second = LiveCurves(notebook=True)
        finished = run(tiny_config, tmp_path / "run", second)
        second.finish()
    finally:
        progress.watchers.clear()
    assert list(second._lines["phase1"]["this run"]) == finished.phase1
    vals = [each["val_ppl"] for each in finished.summary["phase2"]["epochs"]]
    assert list(line(second.figure.axes[0], "this run: validation").get_ydata()) == vals
    loops = [name for name, _, _ in heard]
    assert {"Phase 1", "Phase 2, epoch 1 of at most 3", "Scoring"} <= {*loops}
    assert loops.index("Scoring") < loops.index("Scoring the test split")
    assert loops[-1] == "Writing report and figures"
    assert all(0 <= done <= total for _, done, total in heard)
    assert list(progress.progress_bar([1, 2], "anything")) == [1, 2]  # a view that ended hears no more


def test_runs_of_a_sweep_are_named_and_the_latest_are_drawn(live, epochs):
    for name in ("a", "b", "c", "d"):
        for metric in epochs[100]:
            live({**metric, "run": name, "samples": 100})
    live.finish()
    (ax,) = live.figure.axes
    drawn = {label.partition(":")[0] for each in ax.lines if ": " in (label := str(each.get_label()))}
    assert drawn == {"b", "c", "d"}
    assert "d, Phase 2, epoch" in live.status.value


def test_a_cell_that_has_ended_holds_a_picture_instead_of_widgets(monkeypatch, epochs):
    shown = []

    def display(value, display_id):
        shown.append(value)
        return SimpleNamespace(update=lambda value, raw=False: shown.append(value))

    monkeypatch.setattr("IPython.display.display", display)
    view = LiveCurves(notebook=True)
    (widgets,) = shown
    view({**epochs[100][0], "run": "half of <b>"})
    view.finish()
    assert len(shown) == 2
    assert "half of &lt;b&gt;, Phase 2, epoch 1" in shown[-1]["text/html"]
    assert "<img" in shown[-1]["text/html"]
    view({**epochs[500][0], "run": "another"})  # in the next cell
    assert shown[2:] == [widgets]
    view({**epochs[500][1], "run": "another"})  # too soon to be drawn
    with progress.stage("Scoring the test split"):
        assert "another, Phase 2, epoch 2" in view.status.value
    view.finish()
    assert "another, Phase 2, epoch 2" in shown[-1]["text/html"]


def test_a_view_of_nothing_says_so_and_shows_no_empty_figure(live):
    live.finish()
    assert (live.status.value, live.image.value) == ("Nothing was trained.", "")
