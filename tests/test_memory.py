"""Peaks of memory are those of one run, not of what the process did before."""

import pytest
import torch

from ctxkv_lib.method import memory

CPU = torch.device("cpu")
BLOCK_GIB = 0.25


def use_a_block():
    """Take and give back memory that a peak must show."""
    return torch.ones(int(BLOCK_GIB * 2**30 / 4)).sum()


@pytest.fixture(params=["as this system counts", "a system that cannot count anew"])
def system(request, monkeypatch, tmp_path):
    if request.param != "as this system counts":
        monkeypatch.setattr(memory, "PROCESS", tmp_path)  # no status, and clear_refs is a folder
        (tmp_path / "clear_refs").mkdir()


@pytest.mark.parametrize("of_another_run", [False, True])
def test_a_stage_does_not_inherit_the_peak_of_the_one_before(system, of_another_run):
    memory.begin_peaks(CPU)
    use_a_block()
    first = memory.snapshot("first", CPU)
    if of_another_run:
        memory.begin_peaks(CPU)
    second = memory.snapshot("second", CPU)
    assert second["cpu_peak_gib"] < second["cpu_gib"] + BLOCK_GIB / 2
    assert first["cpu_peak_gib"] >= first["cpu_gib"]


def test_a_peak_between_two_snapshots_is_seen():
    memory.begin_peaks(CPU)
    before = memory.snapshot("before", CPU)
    use_a_block()
    after = memory.snapshot("after", CPU)
    assert after["cpu_peak_gib"] > before["cpu_gib"] + 0.9 * BLOCK_GIB
