"""Notebook 4 in a kernel, without a page: stopped twice, it ends with the same numbers and shows them.

Colab, JupyterLab and VS Code all show what the kernel sends: for a stopped cell an `error`, so that what
follows is not run, whose traceback is the one line to be read.
"""

import json
import re
import time

import pytest
from conftest import TOP, sources
from disturbed_runs import outcome
from jupyter_client.manager import KernelManager

FOLDER = TOP / "notebooks"
PATIENCE = 240  # seconds for any message


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXKV_PRESET", "ci")
    monkeypatch.setenv("CTXKV_RUNS", str(tmp_path / "runs"))
    manager = KernelManager()
    manager.start_kernel(cwd=str(FOLDER))
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(PATIENCE)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def execute(kernel, code, stop_at=None):
    """Run a cell; interrupt it when a widget says `stop_at`. The messages it has sent."""
    manager, client = kernel
    asked, sent = client.execute(code), []
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        message = client.get_iopub_msg(timeout=PATIENCE)
        if message["parent_header"].get("msg_id") != asked:
            continue
        sent.append(message)
        if message["content"].get("execution_state") == "idle":
            return sent
        if stop_at and stop_at in json.dumps(message["content"]):
            manager.interrupt_kernel()
            stop_at = None
    raise AssertionError(f"not done within {PATIENCE} s: {code}")


def errors(sent):
    return [message["content"] for message in sent if message["msg_type"] == "error"]


@pytest.mark.slow
def test_stopped_twice_it_says_one_line_and_ends_with_the_same_numbers(kernel, tmp_path):
    cells = sources(FOLDER / "04_compare_100_vs_500.ipynb")
    begun = ("bootstrap", "parameters", "experiments")
    for name in begun:
        assert errors(execute(kernel, cells[name])) == []
    # The smaller run in Phase 1, then the larger one in its second epoch.
    for place in ("Phase 1: ", "10 samples, Phase 2, epoch 1"):
        sent = execute(kernel, cells["compare"], stop_at=place)
        (stopped,) = errors(sent)
        (line,) = stopped["traceback"]
        assert re.fullmatch(r"Stopped\. (Finished stages|Epoch).+ kept; run the cell again\.", line)
        assert "Traceback" not in json.dumps([message["content"] for message in sent])
    sent = {name: execute(kernel, cell) for name, cell in cells.items() if name not in begun}
    assert not [error for each in sent.values() for error in errors(each)]
    undisturbed = "elsewhere = root.with_name('undisturbed'); compare(configs, elsewhere, elsewhere / 'both')"
    assert errors(execute(kernel, undisturbed)) == []
    for run in ("ci-exact-2", "ci-exact-10"):
        assert outcome(tmp_path / "runs" / run) == outcome(tmp_path / "undisturbed" / run)
    check_outputs(sent, json.loads((tmp_path / "runs/ci-exact-10-vs-2/comparison.json").read_text())["runs"])


def check_outputs(sent, summaries):
    """The cells show the numbers of the comparison beside the published ones, and its files."""
    assert [summary["samples"] for summary in summaries] == [2, 10]
    expected = {
        "compare": "10 samples: validation, epoch 3: ",  # drawn once more when the cell ended
        "table": f"{summaries[1]['phase2']['val_ppl']:,.1f}",
        "published-table": "361.0",
        "explore": "application/vnd.jupyter.widget-view+json",
        "report": "report.ja.md",
    }
    for cell, words in expected.items():
        assert words in json.dumps([message["content"] for message in sent[cell]]), cell
