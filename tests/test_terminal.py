"""What a terminal or a log shows: no more than happened, nothing left over, and what was probably meant.

And what is shown, or heard by watchers and listeners, while something goes on.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import tqdm
from conftest import TOP, Terminal, write_conversations
from sample_runs import write_run
from test_cli import tiny_run
from transformers.utils import logging

import ctxkv_lib
from ctxkv_lib import cli, progress
from ctxkv_lib.cli import main
from ctxkv_lib.experiments import run
from ctxkv_lib.progress import fitted
from ctxkv_lib.report.tables import format_scores
from ctxkv_lib.runs.run_folder import load_run


def test_a_log_has_a_line_an_epoch_and_a_finished_run_prints_none(printed_by, tmp_path, tiny_settings):
    changed = {"phase1.max_iterations": 10, "phase1.stop_rate": 1}
    command = tiny_run(tmp_path / "run", tiny_settings | changed)
    *lines, _, _ = [line.partition(":")[0] for line in printed_by(*command).splitlines()]
    assert lines == ["Phase 1, iteration 10", *(f"Phase 2, epoch {n} of at most 3" for n in (1, 2, 3))]
    assert [line.split()[0] for line in printed_by(*command).splitlines()] == ["Best", "Report:"]


def test_a_line_of_a_log_is_there_as_it_happens(monkeypatch):
    flushed, above_bars = [], []
    monkeypatch.setattr("builtins.print", lambda line, flush=False: flushed.append(flush))
    monkeypatch.setattr(progress, "notice", above_bars.append)
    numbers = {"train_ppl": 9.0, "val_ppl": 9.0, "val_acc": 0.1, "improved": True}
    first, second = ({"stage": "phase2", "epoch": epoch, **numbers} for epoch in (1, 2))
    show = progress.epoch_printer(3, [first])
    for metric in (first, second):
        show({**metric, "samples": 8, "memory": {}})
    assert (flushed, above_bars) == ([True], [])
    monkeypatch.setattr(sys, "stderr", Terminal())
    for metric in ({"stage": "phase1", "iteration": 10, "loss": 1.0, "convergence_rate": 0.5}, second):
        show(metric)
    assert (flushed, len(above_bars)) == ([True], 1)


INTERRUPTED = """
import sys
class Interrupt:
    def find_spec(name, *_):
        if name == "ctxkv_lib.options":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt)
from ctxkv_lib.__main__ import main
sys.exit(main())
"""


def test_ctrl_c_while_modules_load_is_one_line():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "ctxkv: Stopped.\n")
    project = (cli.Path(ctxkv_lib.__file__).parents[1] / "pyproject.toml").read_text()
    assert 'ctxkv = "ctxkv_lib.__main__:main"' in project  # what the installed command calls


def test_ctrl_c_leaves_nothing_of_a_bar(monkeypatch):
    def stopped(*_):
        for _ in progress.progress_bar(range(3), "Steps"):
            raise KeyboardInterrupt

    terminal, width = Terminal(), 60
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((width, 24)))
    monkeypatch.setattr("ctxkv_lib.report.info.describe", stopped)
    assert main(["info"]) == 130
    *drawn, last = terminal.getvalue().split("\r")
    assert max(map(len, drawn)) < width - len("^C")  # so that its echo is on the line that is erased
    assert last.startswith("\x1b[2Kctxkv: Stopped.")


@pytest.mark.parametrize("width", [0, 80])
def test_a_bar_is_whole_on_a_terminal_that_does_not_know_its_width(monkeypatch, width):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((width, 0)))
    with progress.stage("Reading the tokenizer"):
        pass
    assert "\rReading the tokenizer 00:00\r" in terminal.getvalue()


def test_long_rows_break_on_a_narrow_terminal(monkeypatch):
    row = "KV cache of a sequence          621 contexts, 621 KiB   however long the text"
    assert fitted(row) == row  # in a pipe
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    lines = fitted(f"a  b\n\n{row}\n{'word ' * 20}").splitlines()
    assert lines[:4] == ["a  b", "", row[:53], "    however long the text"]
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("rnu", "run"),
        ("run --smaples 3", "--samples"),
        ("info --preset ofline", "offline"),
        ("info --recipe exakt", "exact"),
        ("info --set phse2.patience=3", "phase2"),
        ("info --set phase2.patiense=3", "patience"),
        ("info --set qqqqqq.x=3", None),
    ],
)
def test_what_is_misspelled_is_refused_with_what_was_probably_meant(capsys, line, meant):
    try:
        code = main(line.split())
    except SystemExit as stopped:
        code = stopped.code
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert last.endswith(f"Did you mean {meant}?") if meant else "Did you mean" not in last


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
@pytest.mark.parametrize(("typed", "found"), [("ev", "evaluate"), ("generate --t", "--temperature\n--top-k")])
def test_a_shell_completes_commands_and_options(printed_by, typed, found):
    words = ["ctxkv", *typed.split()]
    script = printed_by("completion", "bash")
    script += f"\nCOMP_WORDS=({' '.join(words)}) COMP_CWORD={len(words) - 1}\n_ctxkv\n"
    script += "printf '%s\\n' ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (found, "")
    assert "bashcompinit" in printed_by("completion", "zsh")


def test_the_version_has_a_short_form(capsys):
    for option in ("-v", "--version"):
        with pytest.raises(SystemExit):
            main([option])
        assert capsys.readouterr().out == f"ctxkv {ctxkv_lib.__version__}\n"


def test_a_read_only_run_is_refused_before_it_is_evaluated(printed_by, tmp_path, monkeypatch):
    run, data = write_run(tmp_path / "run"), tmp_path / "chats.jsonl"
    write_conversations(data, 2)
    monkeypatch.setattr(os, "access", lambda path, _: path != run)
    monkeypatch.setattr("ctxkv_lib.runs.trained.evaluate_texts", None)  # not to be called
    assert f"{run} is read-only; evaluate a copy" in printed_by("evaluate", run, "--data", data, code=2)


@pytest.mark.parametrize(
    ("word_ppl", "shown"), [(1234.5, "1,234.5"), (60.0**150, "over a billion"), (None, "over a")]
)
def test_a_perplexity_of_words_has_no_more_digits_than_can_be_read(word_ppl, shown):
    scores = {
        "conversations": 1,
        "tokens": 9,
        "ppl": 60.0,
        "word_ppl": word_ppl,
        "bits_per_byte": 2.0,
        "accuracy": 0.1,
    }
    text = format_scores({**scores, "by_position": [], "by_history": []})
    assert f"PPL 60.0 a token, {shown}" in text
    assert "a word; " in text


def test_small_data_take_more_than_nothing(printed_by):
    sizes = ["info", "--train-tokens", 1000, "--val-tokens", 200]
    text = printed_by(*sizes)
    assert " 0 MiB" not in text
    assert "195 KiB" in text
    text = printed_by(*sizes, "--preset", "ci")
    assert not re.search(r"\b0(\.0+)? [GM]iB", text)
    assert "Phase 1 125 KiB, Phase 2 62 KiB" in text
    assert " 0 s" not in text
    found = printed_by(*sizes, "--json")  # not of the tokens that are known for these data
    assert [*found["caches_dense_fp32_mib"].values()] == [0.98, 2.93, 0.19, 0.58, 4.68]
    assert found["caches_bf16_mib"]["val_ctx"] == 0.2


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


def test_elsewhere_nothing_is_shown_and_a_notice_is_not_painted_red_in_a_notebook(capsys, monkeypatch):
    with progress.stage("Making the token table"):
        progress.say("a line")
        assert list(progress.progress_bar(range(3), "Steps")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    progress.notice("in a terminal or a log")
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    progress.notice("in a notebook")
    assert capsys.readouterr() == ("in a notebook\n", "in a terminal or a log\n")


@pytest.mark.parametrize(
    ("shell", "expected"), [(None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=1), True)]
)
def test_a_notebook_is_where_ipython_has_a_kernel(shell, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert progress.in_notebook() == expected


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
@pytest.mark.parametrize("are_shown", [True, False])
def test_bars_of_transformers_are_hidden_and_then_as_before(are_shown, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", are_shown)
    with pytest.raises(AssertionError), progress.transformers_bars_hidden():
        assert logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() == are_shown


def test_watchers_hear_where_a_loop_goes_on_and_nothing_of_an_empty_one(monkeypatch):
    heard = []
    monkeypatch.setattr(progress, "watchers", [lambda *step: heard.append(step)])
    list(progress.progress_bar("ab", "Steps", total=10, initial=8))
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


def test_the_listener_of_the_docs_sends_the_numbers_to_a_tracker(tiny_config, tmp_path, monkeypatch):
    """Its code as printed there, with a stand-in for TensorBoard's writer."""
    sent, page = [], (TOP / "docs" / "python.md").read_text(encoding="utf-8")
    writer = SimpleNamespace(add_scalar=lambda *numbers: sent.append(numbers))
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: writer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (code,) = (block for block in re.findall(r"(?s)```python\n(.*?)```", page) if "SummaryWriter" in block)
    ctxkv = SimpleNamespace(run=partial(run, out=tmp_path / "run"))
    exec(code, {"ctxkv": ctxkv, "config": tiny_config})
    lines = load_run(tmp_path / "run").metrics
    assert ("phase1/loss", lines[0]["loss"], lines[0]["iteration"]) in sent
    assert ("phase2/val_ppl", lines[-1]["val_ppl"], lines[-1]["epoch"]) in sent
    assert all(isinstance(value, int | float) for _, value, _ in sent)
