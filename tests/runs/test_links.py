"""Equal tensor files of runs are stored once, and a saved model works wherever its folder is copied."""

import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import cut, flip, local_experiment, tiny_ids
from hub_standin import MAIN
from transformers import AutoModelForCausalLM

from ctxkv_lib.experiments import run
from ctxkv_lib.runs.folder import TABLE_SHARD, RunFolder
from ctxkv_lib.runs.generation import generate_text
from ctxkv_lib.runs.links import link_equal_files
from ctxkv_lib.runs.listing import results
from ctxkv_lib.runs.opened import open_run
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.runs.summary import load_run

TABLE = f"{TABLE_SHARD}00002.safetensors"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Make two runs in one folder that differ in Phase 1, so that each run computes its own contexts."""
    folder = tmp_path_factory.mktemp("two")
    config = build_config("ci", samples=8, settings=local_experiment(folder) | {"phase2.max_epochs": 1})
    return [
        run(config.replace({"phase1.learning_rate": rate}), folder / "runs" / name)
        for name, rate in (("first", 0.002), ("second", 0.01))
    ]


@pytest.fixture
def copies(two, tmp_path):
    """Copy both runs with their hard links, so that a test may damage them."""
    root = tmp_path / "runs"
    for finished in two:
        copy = shutil.copytree(finished.path, root / finished.path.name)
        for name in ("caches/train_emb.safetensors", TABLE):
            if (root / "first" / name) != copy / name:
                (copy / name).unlink()
                os.link(root / "first" / name, copy / name)
    return root / "first", root / "second"


def disk_use(*folders):
    """Return the total size of folders in bytes, counting each linked file once."""
    files = [file.stat() for folder in folders for file in Path(folder).rglob("*") if file.is_file()]
    return sum({status.st_ino: status.st_size for status in files}.values())


def test_runs_share_equal_files_and_a_model_shares_its_weights_with_the_checkpoint(two):
    first, second = (finished.path for finished in two)
    for name in (TABLE, "caches/train_emb.safetensors"):
        assert (first / name).samefile(second / name), name
    assert not (first / "caches/train_ctx.safetensors").samefile(second / "caches/train_ctx.safetensors")
    for path in (first, second):
        weights = path / "checkpoint" / "weights.safetensors"
        assert weights.samefile(path / "model" / "model-00002-of-00002.safetensors")
    table = (first / TABLE).stat().st_size
    assert disk_use(first) > table
    assert disk_use(first, second) < disk_use(first) + disk_use(second) - table
    shown = results(first.parent)["mib"]
    assert shown.sum() == pytest.approx(disk_use(first.parent) / 2**20)


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_shared_file_is_repaired_run_by_run(two, copies, damage, capsys):
    damage(copies[0] / TABLE)
    for finished, path in zip(two, copies, strict=True):
        run(finished.config, path, again=True)
        assert "model: recomputed, since" in capsys.readouterr().err
        assert (path / TABLE).read_bytes() == (two[0].path / TABLE).read_bytes()
        assert load_run(path).summary == finished.summary
    assert (copies[0] / TABLE).samefile(copies[1] / TABLE)
    shutil.rmtree(copies[0])
    assert load_run(copies[1], "").summary == two[1].summary


def test_files_stay_as_they_are_where_the_file_system_cannot_link(two, tmp_path, monkeypatch):
    copies = [shutil.copytree(each.path, tmp_path / "runs" / each.path.name) for each in two]
    folder = RunFolder.read(copies[1])
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError("no links here")))
    link_equal_files(folder, "model", folder.records["model"].files)
    assert os.link.called
    assert not (copies[0] / TABLE).samefile(copies[1] / TABLE)
    load_run(copies[1], "")
    assert not [*copies[1].rglob(".*.part")]


def test_a_saved_model_loads_from_a_copy_from_the_hub_and_as_it_was_saved_again(two, tmp_path, hub):
    ids = tiny_ids(5)
    copy = shutil.copytree(two[1].path / "model", tmp_path / "elsewhere" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(two[1].path / "model", trust_remote_code=True)
    expected = loaded(ids[None]).logits
    loaded.save_pretrained(tmp_path / "again")
    hub.files |= {("me/model", MAIN, file.name): file.read_bytes() for file in copy.iterdir()}
    for place in (copy, tmp_path / "again", "me/model"):
        saved = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
        torch.testing.assert_close(saved(ids[None]).logits, expected)


def test_a_run_without_a_saved_model_is_used_from_its_checkpoint_and_gets_the_model_later(two, tmp_path):
    config, out = two[0].config, tmp_path / "run"
    finished = run(config, out, save_model=False)
    assert not (out / "model").exists()
    assert results(tmp_path)["state"].tolist() == ["finished"]
    assert generate_text(finished, "the cat", max_new_tokens=5, temperature=0.0) == generate_text(
        two[0], "the cat", max_new_tokens=5, temperature=0.0
    )
    losses, expected = (open_run(folder).stream("val").token_losses() for folder in (out, two[0]))
    torch.testing.assert_close(losses, expected)
    (out / "report.md").write_text("mine")
    heard = []
    run(config, out, heard.append)
    assert all(metric["replayed"] for metric in heard)
    assert (out / "report.md").read_text() == "mine"
    for name in (TABLE, "model/README.md", "model/tokenizer.json"):
        assert (out / name).is_file()
    assert (out / TABLE).read_bytes() == (two[0].path / TABLE).read_bytes()
    before = (out / TABLE).stat()
    run(config, out, save_model=False)  # does not touch the saved model
    assert (out / TABLE).stat().st_ino == before.st_ino
