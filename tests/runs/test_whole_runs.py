"""Whole runs keep their promises wherever contexts are held, and whatever lies in their folder."""

import pickle
import shutil

import numpy
import pytest
import torch
from conftest import write_conversations
from test_ranks import processes

from ctxkv_lib.cli import main
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.runs import scratch, streamed
from ctxkv_lib.runs.caches import load_cache, load_ids
from ctxkv_lib.runs.provenance import set_threads
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.runs.trained import load_trained, open_run
from ctxkv_lib.runs.verification import verify


def test_no_pickle_is_loaded_from_a_run(tmp_path, tiny_config, monkeypatch):
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (numpy, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a pickle was loaded"))
    model = run(tiny_config, tmp_path / "run").path / "model"
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"):
        (model / name).write_bytes(b"a pickle")
    again = run(tiny_config, tmp_path / "run")
    open_run(again.path)
    write_conversations(tmp_path / "other.jsonl", 2)
    assert main(["evaluate", str(again.path), "--data", str(tmp_path / "other.jsonl")]) == 0
    assert main(["generate", str(again.path), "--prompt", "the cat", "--max-new-tokens", "2"]) == 0
    assert main(["report", str(again.path)]) == 0
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is missing; make it again"):
        load_trained(again.path, torch.device("cpu"))


def test_a_run_without_free_memory_gives_the_same_numbers(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "free_bytes", lambda device: 0)
    short = run(finished_run.config, tmp_path / "short")
    for key in ("val_ppl", "train_ppl", "val_acc"):
        assert short.summary["phase2"][key] == finished_run.summary["phase2"][key]


def test_a_streamed_run_is_a_run_like_any_other(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr("ctxkv_lib.runs.contexts.BEGINNING_TOKENS", 200)
    monkeypatch.setattr(streamed, "BLOCK_TOKENS", 128)
    monkeypatch.setattr(streamed, "STRIDE", 64)
    found = run(finished_run.config.replace({"runtime.context_cache": "streamed"}), tmp_path / "run")
    folder = found.path / "caches"
    assert len(load_ids(folder, "train")) == finished_run.summary["train_tokens"] > 300
    beginning, whole = load_cache(folder, "train"), load_cache(finished_run.path / "caches", "train")
    assert len(beginning) == 200
    torch.testing.assert_close(beginning.contexts, whole.contexts[:201], atol=2e-5, rtol=0)
    assert "computed when needed" in found.summary["provenance"]["caches"]
    assert verify(found.path).intact


@pytest.mark.slow
def test_two_processes_do_one_run(finished_run, tmp_path):
    alone = finished_run
    threads = torch.get_num_threads()
    set_threads(2)
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # begins OpenMP's threads, which are not copied
    processes(2, run, alone.config, tmp_path / "both")
    torch.set_num_threads(threads)
    both = load_run(tmp_path / "both")
    assert verify(both.path).intact
    assert "1 thread)" in both.summary["provenance"]["device"]
    assert (alone.summary["provenance"]["processes"], both.summary["provenance"]["processes"]) == (1, 2)
    for name in ("val_ppl", "train_ppl", "val_acc"):
        assert both.summary["phase2"][name] == pytest.approx(alone.summary["phase2"][name], rel=1e-4)
    assert both.summary["test"]["ppl"] == pytest.approx(alone.summary["test"]["ppl"], rel=1e-4)
    assert [line["stage"] for line in both.metrics] == [line["stage"] for line in alone.metrics]


def test_verify_says_what_to_do_where_no_stage_is_recorded(finished_run, tmp_path):
    with pytest.raises(UserError, match="holds no finished stage; name a run folder"):
        verify(finished_run.path / "model")  # which has a config.json, too
    shutil.copy(finished_run.path / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"holds no finished stage; make it with `ctxkv run .*`\."):
        verify(tmp_path)
