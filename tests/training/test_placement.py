import mmap
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model

from ctxkv_lib.experiments.experiment import run
from ctxkv_lib.memory import GIB
from ctxkv_lib.training import placement
from ctxkv_lib.training.caches import StreamCache
from ctxkv_lib.training.placement import place_caches, scratch

CPU = torch.device("cpu")


def test_memory_is_used_where_it_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "free_bytes", lambda device: GIB + 400)
    assert scratch((10, 10), torch.float32, CPU, tmp_path).shape == (10, 10)
    assert not any(tmp_path.iterdir())


def test_without_memory_a_mapped_file_holds_it_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "free_bytes", lambda device: GIB + 399)
    mapped, original = [], mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda *file: mapped.append(file) or original(*file))
    first, second = (scratch((10, 10), torch.float32, CPU, tmp_path / "caches") for _ in range(2))
    first.fill_(1)
    second.fill_(2)
    assert len(mapped) == 2
    assert (first.sum(), second.sum()) == (100, 200)
    assert not any((tmp_path / "caches").iterdir())


def test_a_run_without_free_memory_gives_the_same_numbers(tiny_config, tmp_path, monkeypatch):
    usual = run(tiny_config, tmp_path / "usual")
    monkeypatch.setattr(placement, "free_bytes", lambda device: 0)
    short = run(tiny_config, tmp_path / "short")
    for key in ("val_ppl", "train_ppl", "val_acc"):
        assert short.summary["phase2"][key] == usual.summary["phase2"][key]
    assert not list((tmp_path / "short").rglob("*.scratch"))


def test_where_caches_are_held_is_said():
    cache = StreamCache(tiny_ids(5).int(), torch.zeros(5, TINY["context_dim"]))
    held, words = place_caches({"train": cache}, CPU)
    assert held["train"].contexts is cache.contexts
    assert words.startswith("0 MiB mapped from their files, ")


def test_a_cache_held_elsewhere_is_read_ahead_in_the_same_batches():
    model = tiny_model()
    cache = StreamCache(tiny_ids(60).int(), torch.randn(60, TINY["context_dim"]))
    order = torch.randperm(59)
    elsewhere = SimpleNamespace(config=model.config, device=torch.device("cpu", 0))  # not equal to "cpu"
    ahead, plain = (list(cache.batches(order, 13, reader)) for reader in (elsewhere, model))
    assert [len(batch.targets) for batch in ahead] == [13, 13, 13, 13, 7]
    for found, expected in zip(ahead, plain, strict=True):
        for name in ("inputs", "window", "present", "targets"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_an_error_while_reading_ahead_is_raised():
    cache = StreamCache(tiny_ids(60).int(), torch.randn(60, TINY["context_dim"]))
    elsewhere = SimpleNamespace(config=tiny_model().config, device=torch.device("cpu", 0))
    with pytest.raises(IndexError):
        list(cache.batches(torch.tensor([1, 2, 99]), 2, elsewhere))
