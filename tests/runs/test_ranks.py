"""Several processes against one: the same numbers, whoever does which part."""

import json
import os
import socket
import sys

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model
from ctxkv_lib.runs.machine import threads_put_back
from ctxkv_lib.training.phase1 import train_context_block
from ctxkv_lib.training.phase2 import train_attention
from torch import distributed
from torch.multiprocessing import start_processes

from ctxkv_lib import ranks
from ctxkv_lib.cli import main
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.files import write_json
from ctxkv_lib.method import phase2
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.contexts import distinct_rows
from ctxkv_lib.runs import checkpoint, streamed
from ctxkv_lib.runs.config import Phase1Config, Phase2Config
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.runs.streamed import Streamed, read_once, vocabulary_half
from ctxkv_lib.runs.verification import verify
from ctxkv_lib.threads import set_threads

COUNT, BATCH = 1210, 75  # 17 steps an epoch, whose last has 10 rows
ITERATIONS, EPOCHS = 50, 3


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


def counted(sent):
    """Have each sum over all processes put its bytes into `sent`."""
    original, all_reduce = ranks.sum_, distributed.all_reduce

    def count(tensor, **named):
        sent[-1] += tensor.nbytes
        return all_reduce(tensor, **named)

    def sum_(tensors):
        sent.append(0)
        original(tensors)

    ranks.sum_, distributed.all_reduce = sum_, count


def train_both(folder, stop_in_epoch=None):
    """Phase 1 and, on a stream of its contexts and on one that makes them when needed, Phase 2.

    The first process writes the losses, and what each step sent.
    """
    sent = []
    if ranks.count() > 1:
        set_threads(2)
        counted(sent)
    model, ids = tiny_model(), tiny_ids(COUNT + 1)
    model.set_phase(1)
    contexts, lines = torch.empty(COUNT + 1, TINY["context_dim"]), []
    config = Phase1Config(max_iterations=ITERATIONS + 1, batch_size=200, stop_rate=1.0, plateau_rate=1.0)
    train_context_block(
        model.context_block,
        *distinct_rows(model, ids[:-1]),
        config,
        contexts,
        torch.Generator().manual_seed(2),
        lines.append,
    )
    phase1_sent = sent[: 2 * ITERATIONS]
    found = {"phase1": [line["loss"] for line in lines], "rate": lines[-1]["convergence_rate"]}
    starts, _ = read_once(model, ids, 1e-5, torch.empty(1, TINY["context_dim"]))
    streams = {
        "cached": StreamCache(ids.int(), contexts),
        "streamed": Streamed(ids, starts, vocabulary_half(model), torch.float32),
    }
    validation = StreamCache(tiny_ids(131, seed=5).int(), torch.full((131, TINY["context_dim"]), 0.1))
    for name, stream in streams.items():
        sent.clear()
        epochs = train_epochs(model, stream, validation, folder / name, stop_in_epoch)
        found[name] = [(epoch["train_ppl"], epoch["val_ppl"], epoch["val_acc"]) for epoch in epochs]
        found[f"{name} sent"] = sorted(set(sent))
    if not ranks.index():
        write_json(folder / f"{ranks.count()}.json", {**found, "phase1 sent": phase1_sent})


def train_epochs(model, stream, validation, path, stop_in_epoch):
    config = Phase2Config(max_epochs=EPOCHS, batch_size=BATCH, patience=EPOCHS)
    checkpoint.EVERY_SECONDS, checkpoint.WRITING_SHARE, phase2.CHECKED_STEPS = 0, 1e9, 5
    original, steps = phase2.add_gradients, []

    def stopping(*batch):
        steps.append(1)
        if stop_in_epoch and len(steps) == 17 * (stop_in_epoch - 1) + 8:
            raise KeyboardInterrupt
        return original(*batch)

    phase2.add_gradients = stopping
    try:
        return train_attention(
            tiny_model(), stream, validation, config, 1, path, "k", lambda metric: None
        ).epochs
    except KeyboardInterrupt:
        return []
    finally:
        phase2.add_gradients = original


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(streamed, "STRIDE", 16)
    monkeypatch.setattr(streamed, "BLOCK_TOKENS", 160)
    monkeypatch.setattr(streamed, "POOL_BLOCKS", 3)


def numbers(folder, count):
    found = json.loads((folder / f"{count}.json").read_text())
    return found, {name: torch.tensor(found[name]) for name in ("phase1", "rate", "cached", "streamed")}


@pytest.mark.slow
def test_one_two_and_four_processes_give_the_same_numbers_and_send_the_gradients(tmp_path, small_blocks):
    train_both(tmp_path / "1")
    _, alone = numbers(tmp_path / "1", 1)
    assert len(alone["phase1"]) == ITERATIONS
    for count in (2, 4):
        folder = tmp_path / str(count)
        processes(count, train_both, folder)
        found, together = numbers(folder, count)
        for name, expected in alone.items():
            torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-4, msg=name)
        model = tiny_model()
        block = sum(p.numel() for p in model.context_block.parameters())
        width = TINY["context_dim"]
        assert found["phase1 sent"] == [4 * (block + count * width), 16] * ITERATIONS
        model.set_phase(2)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert max(found["cached sent"]) == 4 * (trained + 1)


@pytest.mark.slow
def test_a_training_goes_on_in_another_number_of_processes(tmp_path, small_blocks):
    train_both(tmp_path / "whole")
    _, whole = numbers(tmp_path / "whole", 1)
    processes(2, train_both, tmp_path, 2)  # stopped in epoch 2
    train_both(tmp_path)
    _, resumed = numbers(tmp_path, 1)
    for name, expected in whole.items():
        torch.testing.assert_close(resumed[name], expected, rtol=1e-4, atol=1e-4, msg=name)


def meet_an_error(folder):
    assert ranks.from_first(lambda: ranks.index() + ranks.count()) == 1  # the first, alone
    try:
        ranks.from_first(lambda: json.loads("{"))
    except Exception as error:
        said = type(error).__name__
    first = ranks.is_first_to_say("something")
    try:
        if ranks.index():
            return
        ranks.sum_([torch.ones(3)])  # the other one is no more
    except UserError as error:
        write_json(folder / "said.json", [said, str(error)])
    finally:
        (folder / f"{ranks.index()}-{first}").touch()


def test_an_error_in_one_process_ends_all_with_a_sentence(tmp_path):
    processes(2, meet_an_error, tmp_path)
    said, sentence = json.loads((tmp_path / "said.json").read_text())
    assert said == "JSONDecodeError"
    assert sentence.startswith("Another process of this run has ended")
    assert sum(path.name.endswith("True") for path in tmp_path.iterdir()) == 1


@pytest.mark.parametrize("shape", [(5000, 256), (4, 4), (7, 3), (1, 1)])
def test_draws_of_another_process_are_gone_through(shape):
    drawn, skipped = (torch.Generator().manual_seed(3) for _ in range(2))
    torch.empty(shape).normal_(generator=drawn)
    ranks.skip_normal(torch.empty(shape), skipped)
    assert torch.equal(drawn.get_state(), skipped.get_state())


def test_every_row_is_somebodys(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [part.stop - part.start for part in ranks.shares(10)] == [3, 3, 2, 2]
    assert ranks.share(10) == slice(6, 8)
    assert ranks.share(2) == slice(2, 2)


def test_other_commands_work_in_one_process(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["list"]) == 2
    assert "Only run and compare work in several processes" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # is put back afterwards
    assert main(["list"]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_two_processes_do_one_run(tiny_config, tmp_path):
    alone = run(tiny_config, tmp_path / "alone")
    with threads_put_back():
        set_threads(2)
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # begins OpenMP's threads, which are not copied
        processes(2, run, tiny_config, tmp_path / "both")
    both = load_run(tmp_path / "both")
    assert verify(both.path).intact
    assert "1 thread)" in both.summary["provenance"]["device"]
    assert (alone.summary["provenance"]["processes"], both.summary["provenance"]["processes"]) == (1, 2)
    for name in ("val_ppl", "train_ppl", "val_acc"):
        assert both.summary["phase2"][name] == pytest.approx(alone.summary["phase2"][name], rel=1e-4)
    assert both.summary["test"]["ppl"] == pytest.approx(alone.summary["test"]["ppl"], rel=1e-4)
    assert [line["stage"] for line in both.metrics] == [line["stage"] for line in alone.metrics]
