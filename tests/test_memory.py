"""Peaks of memory are those of one stage, not of what the process did before."""

import pytest
import torch

from ctxkv_lib.method import memory

CPU = torch.device("cpu")
BLOCK_GIB = 0.25


def use_a_block():
    """Take and give back memory that a peak must show."""
    return torch.ones(int(BLOCK_GIB * 2**30 / 4)).sum()


@pytest.mark.parametrize("is_counted", [True, False])
def test_a_stage_shows_its_own_peak_alone(is_counted, monkeypatch, tmp_path):
    if not is_counted:  # as on a system that cannot count anew
        monkeypatch.setattr(memory, "PROCESS", tmp_path)  # no status, and clear_refs is a folder
        (tmp_path / "clear_refs").mkdir()
    use_a_block()  # of another run
    memory.begin_peaks(CPU)
    before = memory.snapshot("before", CPU)
    use_a_block()
    during, after = (memory.snapshot(stage, CPU) for stage in ("during", "after"))
    for idle in (before, after):
        assert idle["cpu_peak_gib"] < idle["cpu_gib"] + BLOCK_GIB / 2
    assert during["cpu_peak_gib"] >= during["cpu_gib"]
    assert not is_counted or during["cpu_peak_gib"] > before["cpu_gib"] + 0.9 * BLOCK_GIB
