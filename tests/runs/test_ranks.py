"""Several processes against one: the same numbers, whoever computes which rows."""

import json
import os
import socket
import sys

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
    """Let so many forked processes do `work(*arguments)`, as a launcher would; errors are raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_begin, (count, port, work, arguments), count, start_method="fork")


def _begin(index, count, port, work, arguments):
    where = {"RANK": index, "WORLD_SIZE": count, "LOCAL_RANK": index, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
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
    """What rank 0 does for all fails; then the others end, and rank 0 waits for them in vain."""
    said = None
    try:
        ranks.on_rank_0(lambda: json.loads("{"))
    except Exception as error:
        said = type(error).__name__
    if ranks.rank():
        (folder / said).touch()
        return
    try:
        ranks.all_reduce([torch.ones(3)])
    except UserError as error:
        write_json(folder / "said.json", [said, str(error)])


def test_an_error_in_one_process_ends_all_with_a_sentence(tmp_path):
    processes(2, meet_an_error, tmp_path)
    said, sentence = json.loads((tmp_path / "said.json").read_text())
    assert said == "JSONDecodeError"
    assert sentence.startswith("Another process of this run has ended")
    assert (tmp_path / "Ended").exists()


def test_fewer_gpus_than_processes_are_refused(monkeypatch):
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"Process 1 has no GPU of its own, of 1; start one process a GPU\."):
        ranks.join(torch.device("cuda"))


def test_other_commands_work_in_one_process_and_only_rank_0_prints(monkeypatch, printed_by, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "Only run and compare work in several processes" in printed_by("list", code=2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # so that it is restored afterwards
    assert main(["list"]) == 2
    assert capsys.readouterr().out == ""
