import errno
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model

from ctxkv_lib.experiments import run
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.memory import GIB
from ctxkv_lib.runs import placement
from ctxkv_lib.runs.placement import PART_ROWS, give_back, parts, place_caches, scratch

CPU = torch.device("cpu")


def test_memory_is_used_where_it_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "free_bytes", lambda device: GIB + 400)
    assert scratch((10, 10), torch.float32, CPU, tmp_path).shape == (10, 10)
    assert not any(tmp_path.iterdir())


def test_nothing_needs_no_place(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "free_bytes", lambda device: 0)
    assert scratch((10, 0), torch.float32, CPU, tmp_path).shape == (10, 0)


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


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the size of this process is read from /proc"
)
def test_a_mapped_file_gives_its_memory_back_and_keeps_its_numbers(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    held = scratch((PART_ROWS + 1, 256), torch.float32, CPU, tmp_path, spare_memory=True)
    before = resident()
    held.fill_(1)
    assert resident() - before > held.nbytes / 2
    give_back(held[5:])
    assert resident() - before < held.nbytes / 2
    assert held.sum() == held.numel()
    assert [len(part) for part in parts(held)] == [PART_ROWS, 1]
    assert resident() - before < held.nbytes / 2
    assert held.add_(1).sum() == 2 * held.numel()


def test_what_lies_in_memory_is_nothing_to_give_back():
    held = torch.ones(3, 2)
    give_back(held)
    assert [part.tolist() for part in parts(held)] == [held.tolist()]
    assert [*parts(torch.tensor(3))] == [3]


def test_memory_that_was_not_enough_after_all_is_left_for_a_mapped_file(tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 400 bytes.")

    monkeypatch.setattr(torch, "empty", no_memory)
    assert scratch((10, 10), torch.float32, CPU, tmp_path).fill_(1).sum() == 100
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("reserves", [True, False])
def test_a_full_disk_is_noticed_before_the_file_is_used(tmp_path, monkeypatch, reserves):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(placement, "free_bytes", lambda device: 0)
    if reserves:
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    else:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as raised:
        scratch((10, 10), torch.float32, CPU, tmp_path)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_space_is_reserved_by_writing_where_there_is_no_other_way(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(placement, "ZEROS_BYTES", 64)
    with (tmp_path / "file").open("w+b") as file:
        placement._reserve(file.fileno(), 1000)
        assert os.fstat(file.fileno()).st_size == 1000


def test_a_run_without_free_memory_gives_the_same_numbers(tiny_config, tmp_path, monkeypatch):
    usual = run(tiny_config, tmp_path / "usual")
    monkeypatch.setattr(placement, "free_bytes", lambda device: 0)
    short = run(tiny_config, tmp_path / "short")
    for key in ("val_ppl", "train_ppl", "val_acc"):
        assert short.summary["phase2"][key] == usual.summary["phase2"][key]
    assert not list((tmp_path / "short").rglob("*.scratch"))


class Fake:
    """Stands for a tensor and says where it was moved."""

    def __init__(self, nbytes, place="mapped"):
        self.nbytes, self.place = nbytes, place

    def to(self, device):
        return Fake(self.nbytes, device.type)

    def pin_memory(self):
        return Fake(self.nbytes, "pinned")


def placed(monkeypatch, on_device, on_host, device="cuda"):
    """Where the caches go that have these bytes free; two streams, the first with dense embeddings."""
    free = {device: on_device + GIB, "cpu": on_host + GIB}
    caches = {"train": StreamCache(Fake(40), Fake(1000), Fake(3000)), "val": StreamCache(Fake(4), Fake(100))}

    def taking(move, place):
        def moved(tensor, *args):
            if free[place] < 0:
                raise torch.cuda.OutOfMemoryError("not as much as it looked")
            free[place] -= tensor.nbytes
            return move(tensor, *args)

        return moved

    monkeypatch.setattr(Fake, "to", taking(Fake.to, device))
    monkeypatch.setattr(Fake, "pin_memory", taking(Fake.pin_memory, "cpu"))
    monkeypatch.setattr(placement, "free_bytes", lambda where: free[where.type])
    monkeypatch.setattr(placement, "release", lambda where: None)
    held, words = place_caches(caches, torch.device(device))
    return {f"{s} {n}": t.place for s, c in held.items() for n, t in c.tensors().items()}, words


@pytest.mark.parametrize(
    ("on_device", "on_host", "contexts", "embeddings"),
    [
        (9999, 0, "cuda", "cuda"),
        (1200, 9999, "cuda", "pinned"),
        (200, 1000, "pinned", "mapped"),
        (200, 0, "mapped", "mapped"),
    ],
)
def test_each_cache_goes_where_it_fits_the_smallest_first(
    monkeypatch, on_device, on_host, contexts, embeddings
):
    places, _ = placed(monkeypatch, on_device, on_host)
    assert (places.pop("train contexts"), places.pop("train embeddings")) == (contexts, embeddings)
    assert set(places.values()) == {"cuda"}  # ids and validation


def test_caches_step_down_when_moving_them_fails(monkeypatch):
    def no_memory(*_):
        raise torch.cuda.OutOfMemoryError("not as much as it looked")

    monkeypatch.setattr(placement, "free_bytes", lambda device: 100 * GIB)
    monkeypatch.setattr(Fake, "to", no_memory)
    cache = StreamCache(Fake(4), Fake(8))
    held, _ = place_caches({"val": cache}, torch.device("cuda"))
    assert held["val"].contexts.place == "pinned"
    monkeypatch.setattr(Fake, "pin_memory", no_memory)
    held, words = place_caches({"val": cache}, torch.device("cuda"))
    assert held["val"].contexts.place == "mapped"
    assert words.startswith("0 MiB mapped from their files, read ahead, 102,400 MiB free on cuda")


def test_memory_kept_by_the_allocator_is_given_back_before_placing(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("released"))
    monkeypatch.setattr(placement, "free_bytes", lambda device: order.append("measured") or 0)
    place_caches({"val": StreamCache(Fake(4), Fake(8))}, torch.device("cuda"))
    assert order[:2] == ["released", "measured"]


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
        for name in ("tokens", "window", "present", "targets"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_an_error_while_reading_ahead_is_raised():
    cache = StreamCache(tiny_ids(60).int(), torch.randn(60, TINY["context_dim"]))
    elsewhere = SimpleNamespace(config=tiny_model().config, device=torch.device("cpu", 0))
    with pytest.raises(IndexError):
        list(cache.batches(torch.tensor([1, 2, 99]), 2, elsewhere))
