"""Caches as files, and where they are held while Phase 2 reads them."""

from unittest.mock import Mock

import pytest
import torch
from conftest import tiny_model, tiny_stream

from ctxkv_lib.hf.copying_streams import CopyingStream
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.copying import Copying
from ctxkv_lib.method.memory import GIB
from ctxkv_lib.runs import caches, scratch
from ctxkv_lib.runs.caches import ReadAhead, held_mib, load_cache, place_caches, save_cache


def test_held_sizes_are_the_tensors():
    mebibyte = StreamCache(torch.zeros(2**18).int(), torch.zeros(2**18, 2), torch.zeros(2**18, 1))
    held = held_mib(mebibyte, mebibyte)
    assert held == {"train_ctx": 2.0, "train_emb": 2.0, "val_ctx": 2.0, "val_emb": 2.0, "total": 8.0}
    streamed = held_mib(mebibyte, mebibyte, starts=torch.zeros(2**18))
    assert streamed == {**held, "train_ctx": 3.0, "total": 9.0}


def test_dense_caches_survive_the_disk(tmp_path):
    saved = StreamCache(torch.arange(9).int(), torch.randn(9, 4), torch.randn(8, 6))
    save_cache(tmp_path, "train", saved)
    loaded = load_cache(tmp_path, "train").tensors()
    assert loaded.keys() == saved.tensors().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.tensors().items())


@pytest.fixture
def device(monkeypatch):
    """A device that is no CPU: tensors there have no content. Placed caches take its `free` bytes."""
    place, memory = torch.device("meta"), {"free": 0}
    move = torch.Tensor.to

    def taken(tensor, device):
        memory["free"] -= tensor.nbytes
        return move(tensor, device)

    monkeypatch.setattr(torch.Tensor, "to", taken)
    for module in (caches, scratch):
        monkeypatch.setattr(module, "free_bytes", lambda device: memory["free"] + GIB)
    return place, memory


def placed(place):
    """Where two streams are held: of 4,040 bytes, with dense embeddings, and of 112."""
    train = StreamCache(torch.zeros(10).int(), torch.zeros(10, 25), torch.zeros(10, 75))
    streams = {"train": train, "val": StreamCache(torch.zeros(3).int(), torch.zeros(25, 1))}
    held, words = place_caches(streams, place)
    return {split: {t.device.type for t in each.tensors().values()} for split, each in held.items()}, words


@pytest.mark.parametrize(
    ("free", "train", "val"), [(4152, "meta", "meta"), (4151, "cpu", "meta"), (111, "cpu", "cpu")]
)
def test_each_stream_is_moved_whole_if_it_fits_the_smallest_first(device, free, train, val):
    place, memory = device
    memory["free"] = free
    places, words = placed(place)
    assert places == {"train": {train}, "val": {val}}
    assert words.count("on meta") == [train, val].count("meta")
    assert words.count("mapped from its files, read ahead") == [train, val].count("cpu")


def test_memory_that_torch_keeps_for_later_counts_as_free(monkeypatch):
    memory = {"free": 5}
    allocator = Mock(empty_cache=lambda: memory.update(free=9))
    monkeypatch.setattr(torch, "get_device_module", lambda device: allocator)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory["free"], 20))
    assert scratch.free_bytes(torch.device("cuda")) == 9


def test_only_a_plain_stream_is_read_ahead(device):
    place, memory = device
    memory["free"] = 0
    stream = StreamCache(torch.zeros(3).int(), torch.zeros(25, 1))
    held, words = place_caches({"val": CopyingStream(**stream.tensors(), copying=Copying(0.1, 8.0))}, place)
    assert isinstance(held["val"], CopyingStream)
    assert "mapped from its files (" in words


def test_a_stream_stays_in_its_files_if_there_is_less_memory_than_it_looked(device, monkeypatch):
    place, memory = device
    memory["free"] = 9999
    monkeypatch.setattr(torch.Tensor, "to", Mock(side_effect=torch.cuda.OutOfMemoryError))
    assert placed(place)[0] == {"train": {"cpu"}, "val": {"cpu"}}


def test_a_cpu_reads_caches_from_their_files():
    held = {"train": tiny_stream(9)}
    assert place_caches(held, torch.device("cpu")) == (held, "0 MiB mapped from their files")


def test_reading_ahead_gives_the_same_batches_and_passes_an_error_on():
    plain, model = tiny_stream(50), tiny_model()
    order = torch.randperm(50)
    for shard, sizes in ((), [7] * 7 + [1]), ((lambda rows: slice(1, rows),), [6] * 7 + [0]):
        ahead = list(ReadAhead(**plain.tensors()).batches(order, 7, model, *shard))
        assert [len(batch) for batch in ahead] == sizes
        for one, other in zip(plain.batches(order, 7, model, *shard), ahead, strict=True):
            for name in ("tokens", "window", "present", "targets"):
                assert torch.equal(getattr(one, name), getattr(other, name))
    with pytest.raises(IndexError):
        list(ReadAhead(**plain.tensors()).batches(order + 50, 7, model))
