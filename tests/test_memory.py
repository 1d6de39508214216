"""Every stage of a run reports its own peak of memory, and streams are mapped from files."""

import pytest
import torch
from conftest import tiny_stream

from ctxkv_lib.experiments import prepare
from ctxkv_lib.files import write_parts
from ctxkv_lib.method import memory
from ctxkv_lib.method.windows import ContextWindow
from ctxkv_lib.runs.contexts import load_streams
from ctxkv_lib.runs.training import place_streams

CPU = torch.device("cpu")
BLOCK_GIB = 0.25
ONLY_LINUX = pytest.mark.skipif(not (memory.PROCESS / "status").exists(), reason="only Linux resets peaks")


def use_a_block():
    """Allocate and free memory that a peak must show."""
    return torch.ones(int(BLOCK_GIB * 2**30 / 4)).sum()


@pytest.mark.parametrize("is_counted", [True, False])
def test_a_stage_shows_only_its_own_peak(is_counted, monkeypatch, tmp_path):
    if not is_counted:  # as on a system that cannot reset the peak
        monkeypatch.setattr(memory, "PROCESS", tmp_path)  # no file status; clear_refs is a folder
        (tmp_path / "clear_refs").mkdir()
    use_a_block()  # as an earlier run might
    memory.begin_peaks(CPU)
    before = memory.snapshot("before", CPU)
    use_a_block()
    during, after = (memory.snapshot(stage, CPU) for stage in ("during", "after"))
    for idle in (before, after):
        assert idle["cpu_peak_gib"] < idle["cpu_gib"] + BLOCK_GIB / 2
    assert during["cpu_peak_gib"] >= during["cpu_gib"]
    assert not is_counted or during["cpu_peak_gib"] > before["cpu_gib"] + 0.9 * BLOCK_GIB


@ONLY_LINUX
def test_a_run_shows_no_peak_from_before_it(tiny_config, tmp_path):
    use_a_block()
    first, *_ = prepare(tiny_config, tmp_path / "run").run.summary["memory"]
    assert first["cpu_peak_gib"] < first["cpu_gib"] + BLOCK_GIB / 2


def test_streams_stay_in_their_files_if_only_the_total_memory_of_a_gpu_would_hold_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory.GIB, 1000 * memory.GIB))
    streams, words = place_streams({"train": tiny_stream(9)}, torch.device("cuda"))
    assert streams["train"].contexts.device == CPU
    assert words == "train 0 MiB mapped from its files"


@ONLY_LINUX
def test_streams_are_written_part_by_part_and_mapped(tmp_path):
    count, width = 2**18, 256  # 256 MiB
    memory.begin_peaks(CPU)
    before = memory.snapshot("before", CPU)["cpu_gib"]
    for split in ("train", "val"):
        parts = (torch.full((2**12, width), float(number)) for number in range(count // 2**12))
        write_parts(
            tmp_path / f"{split}_ctx.safetensors", {"contexts": (torch.float32, (count, width), parts)}
        )
        ids = {"ids": (torch.int32, (count,), [torch.zeros(count)])}
        write_parts(tmp_path / f"{split}_emb.safetensors", ids)
    window, cache = ContextWindow(range(0, 640, 20)), load_streams(tmp_path)["train"]
    contexts, _ = window.gather(cache, torch.tensor([0, count - 2]), training=False).inputs
    assert contexts[:, 0, 0].tolist() == [0, count // 2**12 - 1]
    assert memory.snapshot("after", CPU)["cpu_peak_gib"] < before + 0.2
