"""What a terminal shows while something goes on, and that nothing is shown elsewhere."""

import io
import time

import pytest
import tqdm
from accelerate import tracking
from accelerate.logging import get_logger
from accelerate.state import PartialState

from ctxkv_lib import progress
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.progress import tracked


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_clock_goes_on_while_a_stage_has_no_steps(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.02)
    progress._keep_moving.cache_clear()
    with progress.stage("Making the token table"):
        time.sleep(0.05)
        before = len(terminal.getvalue())
        deadline = time.monotonic() + 5
        while len(terminal.getvalue()) == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert "Making the token table 00:00" in terminal.getvalue()
    assert not [bar for bar in tqdm.tqdm._instances if not bar.disable]


def test_elsewhere_nothing_is_shown(capsys):
    with progress.stage("Making the token table"):
        progress.say("a line")
        assert list(progress.progress_bar(range(3), "Steps")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_watchers_hear_where_a_loop_goes_on_and_nothing_of_an_empty_one(monkeypatch):
    heard = []
    monkeypatch.setattr(progress, "watchers", [lambda *step: heard.append(step)])
    list(progress.progress_bar(iter("ab"), "Steps", total=10, initial=8))
    list(progress.progress_bar([], "Cells"))
    assert heard == [("Steps", 8, 10), ("Steps", 9, 10), ("Steps", 10, 10)]


def test_a_notice_is_not_painted_red_in_a_notebook(capsys, monkeypatch):
    progress.notice("in a terminal or a log")
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    progress.notice("in a notebook")
    assert capsys.readouterr() == ("in a notebook\n", "in a terminal or a log\n")


class Kept:
    """A tracker that keeps what it is told."""

    requires_logging_directory = True

    def __init__(self, run_name, logging_dir):
        self.told = [(run_name, logging_dir)]
        Kept.last = self

    def start(self):
        get_logger(__name__).debug("what real ones say")
        self.told.append("started")

    def store_init_configuration(self, values):
        self.told.append(values)

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.told.append("finished")


def test_a_tracker_hears_the_numbers_of_every_metric(monkeypatch, tmp_path):
    PartialState._reset_state()
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Kept)
    heard, metric = [], {"stage": "phase2", "epoch": 1, "val_ppl": 9.5, "improved": True, "memory": {}}
    with tracked("tensorboard", tmp_path, {"a.b": None}, heard.append) as listener:
        listener(metric)
        listener(metric)
    values = {"phase2/epoch": 1.0, "phase2/val_ppl": 9.5, "phase2/improved": 1.0}
    place = (tmp_path.name, str(tmp_path / "tracker"))
    assert Kept.last.told == [place, "started", {"a.b": "None"}, (1, values), (2, values), "finished"]
    assert heard == [metric, metric]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_computed(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(UserError, match=r"`pip install accelerate wandb`, or set runtime\.tracker=none"):
        run(tiny_config.replace({"runtime.tracker": "wandb"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
