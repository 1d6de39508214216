"""Threads and precision: what is measured, what is chosen, and that a run keeps to it."""

import json
import platform
import subprocess
import sys

import pytest
import torch

from ctxkv_lib.errors import Stopped, UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.runs import machine

GAIN = "from ctxkv_lib.runs.machine import bf16_gain; print(bf16_gain())"


@pytest.fixture
def two_threads(monkeypatch):
    """As on a machine with two cores, where two threads are quicker; told anew, to a notebook."""
    machine._tell.cache_clear()
    monkeypatch.setattr(machine, "watchers", [print])
    monkeypatch.setattr(machine, "bf16_gain", lambda: 2.1)
    monkeypatch.setattr(machine, "step_seconds", lambda *_: {1: 0.010, 2: 0.006})
    with machine.threads_put_back():
        torch.set_num_threads(2)
        yield


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 1.0, 2: 0.55}, 2),
        ({1: 1.0, 2: 0.95}, 1),  # not worth a second core
        ({1: 1.0, 2: 7.0}, 1),  # a busy machine
        ({1: 1.0, 8: 0.2, 16: 0.6}, 8),
    ],
)
def test_the_fewest_threads_that_are_almost_the_quickest_are_taken(seconds, chosen):
    assert machine.quickest(seconds) == chosen


def test_a_step_is_timed_with_one_with_half_and_with_all_threads():
    before = torch.get_num_threads()
    seconds = machine.step_seconds((8, 16, 300), "bf16", 4)
    assert sorted(seconds) == [1, 2, 4]
    assert all(taken > 0 for taken in seconds.values())
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variable is for these processors")
def test_bf16_without_kernels_is_measured_to_be_slower(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    done = subprocess.run([sys.executable, "-c", GAIN], capture_output=True, text=True, check=True)
    assert float(done.stdout) < machine.LEAST_GAIN["bf16"]


def test_what_was_measured_is_told_in_a_line_and_recorded(two_threads, tiny_config, tmp_path, capsys):
    made = run(tiny_config, tmp_path / "run").summary["provenance"]
    assert (made["threads"], made["precision"]) == (2, "bf16")
    assert "2 threads" in made["device"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Chosen: ")]
    assert "bf16 (bf16 products are 2.1 times as fast as fp32 ones)" in line
    assert "2 of 2 threads (a step's products take 10 ms with 1, 6 ms with 2)" in line
    assert torch.get_num_threads() == 2


def test_a_stopped_run_goes_on_with_the_threads_it_began_with(
    two_threads, tiny_config, tmp_path, monkeypatch, capsys
):
    seen = []

    def stop(metric):
        seen.append(torch.get_num_threads())
        if metric["stage"] == "phase2":
            raise KeyboardInterrupt

    monkeypatch.setattr(machine, "step_seconds", lambda *_: {1: 0.006, 2: 0.010})
    with pytest.raises(Stopped):
        run(tiny_config, tmp_path / "run", stop)
    assert torch.get_num_threads() == 2  # put back
    for unasked in ("step_seconds", "bf16_gain"):
        monkeypatch.setattr(machine, unasked, None)
    made = run(tiny_config, tmp_path / "run", lambda _: seen.append(torch.get_num_threads()))
    assert made.summary["provenance"]["threads"] == 1
    assert set(seen) == {1}
    assert capsys.readouterr().err.count("Chosen: ") == 1


@pytest.mark.parametrize(
    ("device", "units", "said"),
    [
        ("cuda", True, (True, "the GPU has units for bf16")),
        ("cuda", False, (False, "the GPU has no units for bf16")),
        ("mps", True, (False, "bf16 was never measured on mps")),
    ],
)
def test_a_gpu_is_not_measured_but_asked(monkeypatch, device, units, said):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: units)
    assert machine.bf16_verdict(torch.device(device)) == said


def test_settings_leave_nothing_to_measure(two_threads, tiny_config, tmp_path, monkeypatch, capsys):
    for unasked in ("step_seconds", "bf16_gain"):
        monkeypatch.setattr(machine, unasked, None)
    chosen = tiny_config.replace({"runtime.threads": "1", "runtime.precision": "fp32"})
    run(chosen, tmp_path / "run")
    made = json.loads((tmp_path / "run" / "summary.json").read_text())["provenance"]
    assert (made["threads"], made["precision"]) == (1, "fp32")
    assert "Chosen" not in capsys.readouterr().err


def test_threads_are_auto_or_a_number(tiny_config):
    assert tiny_config.replace({"runtime.threads": 3}).runtime.threads == "3"
    for wrong in ("0", "many", "1.5", "1025"):
        with pytest.raises(UserError, match="allowed: auto, or 1 to 1024"):
            tiny_config.replace({"runtime.threads": wrong})
