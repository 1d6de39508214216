"""Several processes compute the same numbers as one process."""

import json
import os
import socket
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import local_experiment
from torch import distributed
from torch.multiprocessing import start_processes

from ctxkv_lib import ranks
from ctxkv_lib.cli import main
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.files import write_json
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.runs.summary import load_run


def processes(count, work, *arguments):
    """Call `work(*arguments)` in `count` forked processes, as a launcher would. Raise their errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_begin, (count, port, work, arguments), count, start_method="fork")


def environment(rank, count, port):
    """Return the variables that a launcher sets for one of `count` processes."""
    where = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in where.items()}}


def _begin(index, count, port, work, arguments):
    os.environ |= {**environment(index, count, port), "GLOO_SOCKET_IFNAME": "lo"}
    ranks.join(torch.device("cpu"))
    work(*arguments)
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["exact", "tuned"])
def test_two_processes_do_one_run(recipe, tmp_path):
    settings = local_experiment(tmp_path) | {"model.attention_dropout": 0.2, "runtime.precision": "fp32"}
    config = build_config("ci", recipe, 8, settings)
    alone = run(config, tmp_path / "alone" / "run")
    processes(2, run, config, tmp_path / "both" / "run")
    both = load_run(tmp_path / "both" / "run", "caches", "checkpoint", "model")
    assert [each.summary["provenance"]["processes"] for each in (alone, both)] == [1, 2]
    for name in ("val_ppl", "train_ppl", "val_acc"):
        assert both.summary["phase2"][name] == pytest.approx(alone.summary["phase2"][name], rel=1e-4)
    assert both.summary["test"]["ppl"] == pytest.approx(alone.summary["test"]["ppl"], rel=1e-4)
    assert [line["stage"] for line in both.metrics] == [line["stage"] for line in alone.metrics]


def meet_an_error(folder):
    """Raise an error without a message on rank 0. Rank 1 ends, so rank 0 cannot communicate with it."""
    with pytest.raises((StopIteration, ranks.PeerFailed)) as raised:
        ranks.on_rank_0(lambda: next(iter(())))
    said = [type(raised.value).__name__, str(raised.value)]
    if ranks.rank() == 0:
        with pytest.raises(UserError) as raised:
            ranks.all_reduce([torch.ones(3)])
        said.append(str(raised.value))
    write_json(folder / f"{ranks.rank()}.json", said)


def test_an_error_in_one_process_ends_all_with_a_sentence(tmp_path):
    processes(2, meet_an_error, tmp_path)
    *said, sentence = json.loads((tmp_path / "0.json").read_text())
    assert said == ["StopIteration", ""]
    assert sentence.startswith("Another process of this run has ended; finished stages")
    assert json.loads((tmp_path / "1.json").read_text()) == ["PeerFailed", "StopIteration"]


@pytest.fixture
def launched(monkeypatch):
    """Return a function that sets the environment of one of two processes, as a launcher does."""

    def launch(rank):
        for name, value in environment(rank, 2, 29500).items():
            monkeypatch.setenv(name, value)

    return launch


def test_fewer_gpus_than_processes_are_refused(monkeypatch, launched):
    launched(1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"Process 1 has no GPU of its own, since this machine has 1; start"):
        ranks.join(torch.device("cuda"))


def test_a_cluster_that_sets_ranks_for_every_program_starts_nothing(launched, monkeypatch):
    launched(1)
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(distributed, "init_process_group", Mock())  # the real function would wait
    ranks.join(torch.device("cpu"))
    assert not distributed.init_process_group.called
    assert (ranks.rank(), ranks.world_size()) == (0, 1)


def test_other_commands_work_in_one_process_and_only_rank_0_prints(launched, monkeypatch, printed_by, capsys):
    launched(0)
    assert "Only run and compare work in several processes" in printed_by("list", code=2)
    launched(1)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # pytest restores it afterwards
    assert main(["list"]) == 2
    assert capsys.readouterr().out == ""
