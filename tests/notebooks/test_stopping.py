"""Notebook 4 in a kernel, without a page: stopped twice, it ends with the same numbers."""

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


def errors(kernel, code, stop_at=0):
    """Run a cell, interrupt it at the drawing of this number, and return the errors that it sends."""
    manager, client = kernel
    asked, sent, drawings = client.execute(code), [], 0
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        message = client.get_iopub_msg(timeout=PATIENCE)
        if message["parent_header"].get("msg_id") != asked:
            continue
        if message["msg_type"] == "error":
            sent.append(message["content"])
        if message["msg_type"] == "update_display_data":
            drawings += 1
            if drawings == stop_at:
                manager.interrupt_kernel()
        if message["content"].get("execution_state") == "idle":
            return sent
    raise AssertionError(f"not done within {PATIENCE} s: {code}")


@pytest.mark.slow
def test_stopped_twice_it_says_one_line_and_ends_with_the_same_numbers(kernel, tmp_path):
    cells = sources(FOLDER / "04_compare_100_vs_500.ipynb")
    shorter = "configs = [each.replace({'phase2.max_epochs': 1}) for each in configs]"
    assert not any(errors(kernel, cell) for cell in (cells["bootstrap"], cells["parameters"], shorter))
    for drawing in (1, 3):  # in Phase 1, then later
        (stopped,) = errors(kernel, cells["compare"], drawing)
        (line,) = stopped["traceback"]
        assert line == "Stopped. Finished stages and saved epochs are kept; run it again to go on."
    assert errors(kernel, cells["compare"]) == []
    undisturbed = "elsewhere = root.with_name('calm')\nctxkv.compare(configs, elsewhere, elsewhere / 'both')"
    assert errors(kernel, undisturbed) == []
    runs = [*(tmp_path / "calm").glob("ci-*")]
    assert len(runs) == 2
    for run in runs:
        assert outcome(tmp_path / "runs" / run.name) == outcome(run)
