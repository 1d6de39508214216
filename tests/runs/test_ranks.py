"""Several processes against one: the same numbers, whoever computes which rows."""

import json
import os
import socket
import sys

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_method
from torch import distributed
from torch.multiprocessing import start_processes

from ctxkv_lib import ranks
from ctxkv_lib.cli import main
from ctxkv_lib.errors import UserError
from ctxkv_lib.files import write_json
from ctxkv_lib.method import phase2
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.config import Phase2Config
from ctxkv_lib.method.contexts import exact_contexts
from ctxkv_lib.method.phase2 import train_attention
from ctxkv_lib.runs import streamed
from ctxkv_lib.runs.long_run import Checkpoint, LongRun
from ctxkv_lib.runs.provenance import set_threads
from ctxkv_lib.runs.streamed import Streamed, project_vocabulary, read_once

COUNT, BATCH = 1203, 75  # 17 steps an epoch, whose last has 3 rows: of four processes, one has none
STEPS, EPOCHS = 17, 3


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
    distributed.destroy_process_group()


def train(folder, stop_in_epoch=None):
    """Phase 2 on cached and on streamed contexts; rank 0 writes the numbers, and bytes sent a step."""
    sent, mean, all_reduce = [], {}, distributed.all_reduce
    if "RANK" in os.environ:
        set_threads(2)
        distributed.all_reduce = lambda tensor, **named: (
            sent.append(tensor.nbytes) or all_reduce(tensor, **named)
        )
    model, ids, found = tiny_method(), tiny_ids(COUNT + 1), {}
    inputs = project_vocabulary(model)
    contexts, _ = exact_contexts(model.context_block, inputs, ids[:-1], 1e-5)
    starts, _ = read_once(model, ids, 1e-5, torch.empty(1, TINY["context_dim"]))
    streams = {
        "cached": StreamCache(ids.int(), contexts),
        "streamed": Streamed(ids, starts, inputs, torch.float32),
    }
    for name, stream in streams.items():
        sent.clear()
        epochs = train_epochs(stream, folder / name, stop_in_epoch)
        found[name] = [[epoch["train_ppl"], epoch["val_ppl"], epoch["val_acc"]] for epoch in epochs]
        mean[name] = sum(sent) / (STEPS + 1) / EPOCHS
    if os.environ.get("RANK", "0") == "0":
        write_json(folder / f"{os.environ.get('WORLD_SIZE', 1)}.json", {"numbers": found, "sent": mean})


def train_epochs(stream, path, stop_in_epoch):
    config = Phase2Config(max_epochs=EPOCHS, batch_size=BATCH, patience=EPOCHS)
    validation = StreamCache(tiny_ids(131, seed=5).int(), torch.full((131, TINY["context_dim"]), 0.1))
    original, steps = phase2.batch_gradients, []

    def stopping(*batch):
        steps.append(1)
        if stop_in_epoch and len(steps) == STEPS * (stop_in_epoch - 1) + 8:
            raise KeyboardInterrupt
        return original(*batch)

    phase2.batch_gradients = stopping
    loop = LongRun("Phase 2", torch.device("cpu"), lambda metric: None, Checkpoint(path, "key"))
    try:
        model = tiny_method(attention_dropout=0.2)
        return train_attention(model, stream, validation, config, 1, loop=loop).epochs
    except KeyboardInterrupt:
        return []
    finally:
        phase2.batch_gradients = original


@pytest.fixture
def small_blocks(monkeypatch, saved_at_every_step):
    monkeypatch.setattr(streamed, "STRIDE", 16)
    monkeypatch.setattr(streamed, "BLOCK_TOKENS", 160)
    monkeypatch.setattr(streamed, "POOL_BLOCKS", 3)
    monkeypatch.setattr(phase2, "CHECKED_STEPS", 5)


def numbers(folder, count):
    found = json.loads((folder / f"{count}.json").read_text())
    return {name: torch.tensor(epochs) for name, epochs in found["numbers"].items()}, found["sent"]


@pytest.mark.slow
def test_one_two_and_four_processes_give_the_same_numbers_and_send_the_gradients(tmp_path, small_blocks):
    train(tmp_path / "1")
    alone, _ = numbers(tmp_path / "1", 1)
    assert alone["cached"].shape == alone["streamed"].shape == (EPOCHS, 3)
    trained = sum(weight.numel() for weight in tiny_method().trained_weights().values())
    for count in (2, 4):
        processes(count, train, tmp_path / str(count))
        together, sent = numbers(tmp_path / str(count), count)
        for name, expected in alone.items():
            torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-4, msg=name)
        assert sent["cached"] <= 4 * (trained + 1)  # a step's, of which an evaluation sends less


@pytest.mark.slow
def test_a_training_continues_in_another_number_of_processes(tmp_path, small_blocks):
    train(tmp_path / "whole")
    whole, _ = numbers(tmp_path / "whole", 1)
    processes(2, train, tmp_path, 2)  # stopped in epoch 2
    train(tmp_path)
    resumed, _ = numbers(tmp_path, 1)
    for name, expected in whole.items():
        torch.testing.assert_close(resumed[name], expected, rtol=1e-4, atol=1e-4, msg=name)


def meet_an_error(folder):
    """What rank 0 does for all fails; then the others end, and rank 0 waits for them."""
    assert ranks.on_rank_0(lambda: ranks.rank() + ranks.world_size()) == 1  # rank 0, alone
    try:
        ranks.on_rank_0(lambda: json.loads("{"))
    except Exception as error:
        said = type(error).__name__
    first = ranks.is_first_to_say("something")
    try:
        if ranks.rank():
            return
        ranks.all_reduce([torch.ones(3)])
    except UserError as error:
        write_json(folder / "said.json", [said, str(error)])
    finally:
        (folder / f"{ranks.rank()}-{first}").touch()


def test_an_error_in_one_process_ends_all_with_a_sentence(tmp_path):
    processes(2, meet_an_error, tmp_path)
    said, sentence = json.loads((tmp_path / "said.json").read_text())
    assert said == "JSONDecodeError"
    assert sentence.startswith("Another process of this run has ended")
    assert sum(path.name.endswith("True") for path in tmp_path.iterdir()) == 1


def test_every_row_is_some_processs(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [part.stop - part.start for part in ranks.shards(10)] == [3, 3, 2, 2]
    assert ranks.shard(10) == slice(6, 8)
    assert ranks.shard(2) == slice(2, 2)


def test_fewer_gpus_than_processes_are_refused_by_the_first(monkeypatch):
    """Which alone can say so before they are connected."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"2 processes, but 1 GPU: start one for each GPU\."):
        ranks.join(torch.device("cuda"))


def test_other_commands_work_in_one_process(monkeypatch, printed_by, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "Only run and compare work in several processes" in printed_by("list", code=2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # so that it is restored afterwards
    assert main(["list"]) == 2
    assert capsys.readouterr() == ("", "")
