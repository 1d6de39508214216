"""Room for large tensors: memory, else a mapped file."""

import errno
import mmap
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from ctxkv_lib.runs.scratch import PART_ROWS, parts, release_mapped, scratch

from ctxkv_lib.method.memory import GIB
from ctxkv_lib.runs import scratch as module

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free."""
    return lambda count: monkeypatch.setattr(module, "free_bytes", lambda device: count)


@pytest.mark.parametrize(("shape", "count"), [((10, 10), GIB + 400), ((10, 0), 0)])
def test_memory_is_used_where_it_is_enough(tmp_path, free, shape, count):
    free(count)
    assert scratch(shape, torch.float32, CPU, tmp_path).shape == shape
    assert scratch(shape, torch.float32, META, tmp_path, spare_memory=True).device == META
    assert not any(tmp_path.iterdir())


def test_memory_of_the_host_is_used_where_that_of_the_device_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda device: GIB + 400 * (device == CPU))
    assert scratch((10, 10), torch.float32, META, tmp_path / "caches").device == CPU
    assert not any(tmp_path.iterdir())


def test_without_memory_a_mapped_file_holds_it_and_leaves_nothing_behind(tmp_path, free, monkeypatch):
    free(GIB + 399)
    mapped, said, original = [], [], mmap.mmap
    monkeypatch.setattr(module, "say", said.append)
    monkeypatch.setattr(mmap, "mmap", lambda *file: mapped.append(file) or original(*file))
    first, second = (scratch((10, 10), torch.float32, CPU, tmp_path / "caches") for _ in range(2))
    first.fill_(1)
    second.fill_(2)
    assert len(mapped) == len(said) == 2
    assert (first.sum(), second.sum()) == (100, 200)
    assert not any((tmp_path / "caches").iterdir())


def test_memory_that_was_not_enough_after_all_is_left_for_a_mapped_file(tmp_path, monkeypatch):
    error = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 400 bytes.")
    monkeypatch.setattr(torch, "empty", Mock(side_effect=error))
    assert scratch((10, 10), torch.float32, CPU, tmp_path).fill_(1).sum() == 100
    monkeypatch.setattr(torch, "empty", Mock(side_effect=RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        scratch((10, 10), torch.float32, CPU, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's size from /proc")
def test_a_mapped_file_gives_its_memory_back_and_keeps_its_numbers(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    held = scratch((PART_ROWS + 1, 256), torch.float32, CPU, tmp_path, spare_memory=True)
    before = resident()
    held.fill_(1)
    assert resident() - before > held.nbytes / 2
    release_mapped(held[5:])
    assert resident() - before < held.nbytes / 2
    assert held.sum() == held.numel()
    assert [len(part) for part in parts(held)] == [PART_ROWS, 1]
    assert resident() - before < held.nbytes / 2
    assert held.add_(1).sum() == 2 * held.numel()


def test_tensors_in_memory_have_parts_too():
    held = torch.ones(3, 2)
    release_mapped(held)
    assert [part.tolist() for part in parts(held)] == [held.tolist()]
    assert [*parts(torch.tensor(3))] == [3]


@pytest.mark.parametrize("reserves", [True, False])
def test_a_full_disk_is_noticed_before_the_file_is_used(tmp_path, free, monkeypatch, reserves):
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    free(0)
    if reserves:
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    else:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as raised:
        scratch((10, 10), torch.float32, CPU, tmp_path)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_space_is_reserved_by_writing_where_there_is_no_other_way(tmp_path, free, monkeypatch):
    free(0)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(module, "ZEROS_BYTES", 64)
    assert scratch((10, 10), torch.float32, CPU, tmp_path).sum() == 0
