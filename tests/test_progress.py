"""What a terminal shows while something goes on, and that nothing is shown elsewhere."""

import re
import sys
import time
from functools import partial
from types import ModuleType, SimpleNamespace

import tqdm
from conftest import TOP, Terminal

from ctxkv_lib import progress
from ctxkv_lib.experiments import run
from ctxkv_lib.runs.run_folder import load_run

PAGE = (TOP / "docs" / "python.md").read_text(encoding="utf-8")


def test_a_clock_goes_on_while_a_stage_has_no_steps(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.02)
    progress._refresh_clocks.cache_clear()
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
    with progress.stage("Work without steps"):
        heard.append("work")
    assert heard == [
        ("Steps", 8, 10),
        ("Steps", 9, 10),
        ("Steps", 10, 10),
        ("Work without steps", 0, 0),
        "work",
    ]


def test_a_notice_is_not_painted_red_in_a_notebook(capsys, monkeypatch):
    progress.notice("in a terminal or a log")
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    progress.notice("in a notebook")
    assert capsys.readouterr() == ("in a notebook\n", "in a terminal or a log\n")


def test_the_listener_of_the_docs_sends_the_numbers_to_a_tracker(tiny_config, tmp_path, monkeypatch):
    """Its code as printed there, with a stand-in for TensorBoard's writer."""
    sent = []
    writer = SimpleNamespace(add_scalar=lambda *numbers: sent.append(numbers))
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: writer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (code,) = (block for block in re.findall(r"(?s)```python\n(.*?)```", PAGE) if "SummaryWriter" in block)
    ctxkv = SimpleNamespace(run=partial(run, out=tmp_path / "run"))
    exec(code, {"ctxkv": ctxkv, "config": tiny_config})
    lines = load_run(tmp_path / "run").metrics
    assert ("phase1/loss", lines[0]["loss"], lines[0]["iteration"]) in sent
    assert ("phase2/val_ppl", lines[-1]["val_ppl"], lines[-1]["epoch"]) in sent
    assert all(isinstance(value, int | float) for _, value, _ in sent)
