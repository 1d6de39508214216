"""Many runs at once give the numbers of runs one at a time, whatever happens to their processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import NearestTwo, in_python, lasting, outcome, settings_of

from ctxkv_lib import parallel
from ctxkv_lib.cli import main
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.parallel import run_all
from ctxkv_lib.runs.folders import run_folder_of
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.runs.summary import load_run


@pytest.fixture
def configs(tiny_config):
    """Three experiments, one of them with a layer of its own."""
    base = tiny_config.replace({"runtime.threads": 1})
    seeds = [base.replace({"runtime.seed": seed}) for seed in (1, 2)]
    return [*seeds, base.with_plugins(layer=NearestTwo)]


def numbers(runs):
    return [lasting(finished.summary) for finished in runs]


@pytest.mark.slow
def test_runs_in_two_processes_equal_runs_one_at_a_time(configs, tmp_path):
    heard = []
    runs = run_all(configs, 2, heard.append, tmp_path / "runs")
    assert numbers(runs) == numbers(
        run(config, tmp_path / "serial" / "run") for config in configs[:1]
    ) + numbers(run_all(configs[1:], 1, root=tmp_path / "one"))
    assert [each.path for each in runs] == [run_folder_of(config, tmp_path / "runs") for config in configs]
    for each in runs:
        epochs = [line["epoch"] for line in heard if line["run"] == each.path.name and "val_ppl" in line]
        assert epochs == [1, 2, 3]
    again = []
    assert run_all(configs, 2, again.append, tmp_path / "runs") == runs
    for each in runs:
        told, replayed = ([m for m in metrics if m["run"] == each.path.name] for metrics in (heard, again))
        assert [{**line, "replayed": True} for line in told] == replayed


def test_a_failed_run_does_not_stop_the_others_and_is_reported_at_the_end(configs, tmp_path):
    bad, before = configs[0].with_plugins(layer=Breaking), own_variables()
    with pytest.raises(UserError, match=r"^1 of 3 runs failed: .*Breaking.*: RuntimeError: broken$"):
        run_all([bad, *configs[1:]], 1, root=tmp_path)
    done = [run_folder_of(config, tmp_path) / "summary.json" for config in configs[1:]]
    assert all(path.is_file() for path in done)
    assert own_variables() == before


def own_variables():
    """Return our environment variables; torch sets some of its own when it compiles."""
    return {name: value for name, value in os.environ.items() if name.startswith("CTXKV")}


class Breaking(NearestTwo):
    def forward(self, embeddings, window, present):
        raise RuntimeError("broken")


class Locked:
    """A loss that cannot be sent to another process."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, contexts):
        return contexts.square().mean()


def test_what_cannot_work_is_refused_in_a_sentence(configs, tmp_path):
    root = tmp_path / "runs"
    with pytest.raises(UserError, match=r"^workers is 0; allowed: 1 or more\."):
        run_all(configs, 0, root=root)
    with pytest.raises(UserError, match="is the folder of two experiments; give each its own seed"):
        run_all([configs[0], configs[0]], 2, root=root)
    with pytest.raises(UserError, match=r"Locked\(\.\.\.\) cannot be sent to another process"):
        run_all([configs[0].with_plugins(loss=Locked())], 2, root=root)
    assert "does not see" in parallel._work(configs[0], root / "run", False, "")
    assert not root.exists()


def test_an_error_of_the_listener_is_raised(configs, tmp_path):
    def listener(metric):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_all(configs[:1], 1, listener, tmp_path)


def test_the_command_line_runs_several_seeds(tiny_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CTXKV_RUNS", str(tmp_path / "runs"))
    command = ["run", "--preset", "ci", "--samples", "8", "--seeds", "1", "2", *settings_of(tiny_settings)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.count("finished") == 2
    assert "seed" in printed
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "--out names one run folder" in capsys.readouterr().err


MANY = """
import signal, sys
from ctxkv_lib import build_config, run_all

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C

settings = dict(word.split("=", 1) for word in sys.argv[2:])
configs = [build_config("ci", samples=8, settings={**settings, "runtime.seed": seed}) for seed in (1, 2)]
run_all(configs, 2, root=sys.argv[1])
"""


def as_words(settings):
    return [f"{name}={value}" for name, value in settings.items()]


@pytest.mark.slow
def test_ctrl_c_stops_all_workers_and_the_same_call_continues(tiny_settings, tmp_path):
    settings = tiny_settings | {"phase2.max_epochs": 9, "phase2.patience": 9, "runtime.threads": 1}
    command = [sys.executable, "-c", MANY, str(tmp_path / "runs"), *as_words(settings)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not [*(tmp_path / "runs").glob("*/metrics.jsonl")]:
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert "Stopped. Finished steps and saved epochs are kept" in process.communicate(timeout=60)[1]
    assert not [*(tmp_path / "runs").glob("*/summary.json")]
    in_python(MANY, tmp_path / "runs", *as_words(settings))
    for seed in (1, 2):
        config = build_config("ci", samples=8, settings={**settings, "runtime.seed": seed})
        expected = run(config, tmp_path / "whole" / f"run-{seed}").path
        assert outcome(run_folder_of(config, tmp_path / "runs")) == outcome(expected)


CLUSTER = """
import os, signal, sys, threading, time
from pathlib import Path

import joblib
from dask.distributed import Client, LocalCluster

from ctxkv_lib import build_config, run_all

if __name__ == "__main__":
    root = Path(sys.argv[1])
    settings = dict(word.split("=", 1) for word in sys.argv[2:])
    configs = [build_config("ci", samples=8, settings={**settings, "runtime.seed": n}) for n in (1, 2, 3, 4)]
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster) as client:
        first = next(iter(client.run(os.getpid).values()))

        def kill():
            while not [*root.glob("*/steps/settings.json")]:
                time.sleep(0.05)
            os.kill(first, signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        with joblib.parallel_config("dask"):
            run_all(configs, root=root)
        assert first not in client.run(os.getpid).values()
"""


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_gives_the_numbers_of_a_serial_run(tiny_settings, tmp_path):
    pytest.importorskip("dask.distributed")
    settings = tiny_settings | {"runtime.threads": 1}
    program = tmp_path / "cluster.py"
    program.write_text(CLUSTER)
    command = [sys.executable, str(program), str(tmp_path / "runs"), *as_words(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    configs = [build_config("ci", samples=8, settings={**settings, "runtime.seed": n}) for n in (1, 2, 3, 4)]
    found = [load_run(run_folder_of(config, tmp_path / "runs")) for config in configs]
    assert numbers(found) == numbers(run_all(configs, 1, root=tmp_path / "serial"))
