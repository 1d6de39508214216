"""Whole runs keep their promises wherever contexts are held and however many processes compute."""

import pytest
import torch
from test_ranks import processes

from ctxkv_lib.experiments import run
from ctxkv_lib.runs import scratch, streamed
from ctxkv_lib.runs.caches import load_cache, load_ids
from ctxkv_lib.runs.provenance import set_threads
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.runs.verification import verify


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
