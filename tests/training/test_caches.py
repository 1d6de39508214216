from pathlib import Path

import pytest
import torch

from ctxkv_lib.errors import UserError
from ctxkv_lib.method.caches import StreamCache, held_mib, load_cache, save_cache
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.memory import GIB, snapshot
from ctxkv_lib.report.info import dense_fp32_mib, gathered_mib


def cache(dense=False):
    return StreamCache(torch.arange(9).int(), torch.randn(9, 4), torch.randn(8, 6) if dense else None)


def test_published_sizes():
    sizes = dense_fp32_mib(587_970, 22_723, ModelConfig())
    published = {"train_ctx": 574, "train_emb": 1723, "val_ctx": 22, "val_emb": 67, "total": 2386}
    assert {name: round(size) for name, size in sizes.items()} == published


@pytest.mark.parametrize(("precision", "most"), [("fp32", 650), ("bf16", 330)])
def test_the_published_run_is_held_in_a_fraction(precision, most):
    assert gathered_mib(587_970, 22_723, ModelConfig(), precision)["total"] <= most


def test_held_sizes_are_the_tensors():
    megabyte = StreamCache(torch.zeros(2**18).int(), torch.zeros(2**18, 2), torch.zeros(2**18, 1))
    held = held_mib(megabyte, megabyte)
    assert held == {"train_ctx": 2.0, "train_emb": 2.0, "val_ctx": 2.0, "val_emb": 2.0, "total": 8.0}
    streamed = held_mib(megabyte, megabyte, starts=torch.zeros(2**18))
    assert streamed == {**held, "train_ctx": 3.0, "total": 9.0}


@pytest.mark.parametrize("dense", [False, True])
def test_caches_survive_the_disk(tmp_path, dense):
    saved = cache(dense)
    save_cache(tmp_path, "train", saved)
    loaded = load_cache(tmp_path, "train")
    assert torch.equal(saved.ids, loaded.ids)
    assert torch.equal(saved.contexts, loaded.contexts)
    assert (loaded.embeddings is None) == (not dense)
    if dense:
        assert torch.equal(saved.embeddings, loaded.embeddings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train_ctx.safetensors", "train_emb.safetensors"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-7])])
def test_damaged_caches_are_refused(tmp_path, damage):
    save_cache(tmp_path, "val", cache())
    damage(tmp_path / "val_ctx.safetensors")
    with pytest.raises(UserError, match="cannot be used"):
        load_cache(tmp_path, "val")


def test_memory_snapshot_sees_an_allocation():
    before = snapshot("before", torch.device("cpu"))
    block = torch.ones(GIB // 16 // 4)
    after = snapshot("after", torch.device("cpu"))
    grown = after["cpu_gib"] - before["cpu_gib"]
    assert 0.9 / 16 < grown < 1.5 / 16, len(block)
    assert after["cpu_peak_gib"] >= after["cpu_gib"] - 0.01
    assert (after["stage"], after["gpu_gib"], after["gpu_peak_gib"]) == ("after", None, None)
