"""What a terminal shows while something goes on, and that nothing is shown elsewhere."""

import io
import time

import tqdm

from ctxkv_lib import progress


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


def test_a_notice_is_not_painted_red_in_a_notebook(capsys, monkeypatch):
    progress.notice("in a terminal or a log")
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    progress.notice("in a notebook")
    assert capsys.readouterr() == ("in a notebook\n", "in a terminal or a log\n")
