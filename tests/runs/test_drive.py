"""Tests of the copies of run folders in Google Drive."""

import errno
import re
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import outcome, stop_at
from sample_runs import write_run

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.runs import drive, training
from ctxkv_lib.runs.drive import kept_on_drive
from ctxkv_lib.runs.folder import RunFolder
from ctxkv_lib.runs.opened import open_run
from ctxkv_lib.runs.records import Record
from ctxkv_lib.runs.summary import load_run


@pytest.fixture
def on_drive(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXKV_DRIVE", str(tmp_path / "drive"))
    return tmp_path / "drive"


def test_a_run_on_a_new_machine_goes_on_from_what_drive_holds(on_drive, tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(drive, "SAVE_SECONDS", 0)
    monkeypatch.setattr(training, "EVERY_SECONDS", 0)
    undisturbed = run(tiny_config, tmp_path / "undisturbed")
    folder = tmp_path / "runs" / "run"

    def interrupted():
        with kept_on_drive(folder, listener=stop_at("phase2", 2)) as listener:
            run(tiny_config, folder, listener)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (copy,) = on_drive.iterdir()
    assert {path.name.partition("-")[0] for path in copy.iterdir()} == {"settings", "contexts", "state"}
    contexts = {path: path.stat().st_mtime_ns for path in copy.glob("contexts-*")}
    shutil.rmtree(folder)
    with kept_on_drive(folder) as listener:
        assert '"phase1"' in (folder / "metrics.jsonl").read_text()
        finished = run(tiny_config, folder, listener)
    assert {path: path.stat().st_mtime_ns for path in copy.glob("contexts-*")} == contexts  # written once
    names = sorted(path.name.partition("-")[0] for path in copy.iterdir())
    assert names == ["contexts", "model", "phase2", "results", "settings", "test"]
    ppls = [
        [line["val_ppl"] for line in each.summary["phase2"]["epochs"]] for each in (undisturbed, finished)
    ]
    assert ppls[0] == pytest.approx(ppls[1])
    shutil.rmtree(folder)
    with kept_on_drive(folder):
        kept, expected = outcome(folder), outcome(undisturbed.path)
        assert kept.pop("files") == expected.pop("files") - {".lock"}
        assert kept == expected
        assert open_run(folder).stream("val").token_losses().exp().mean() > 1


def test_weights_of_a_saved_model_that_every_machine_makes_alike_are_not_archived(
    on_drive, finished_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(drive, "SAME_EVERYWHERE", ("random",))  # this run's token table is random
    folder = Path(shutil.copytree(finished_run.path, tmp_path / "runs" / "run"))
    with kept_on_drive(folder):
        pass
    archives = {path.name for path in on_drive.glob("*/*")}
    shutil.rmtree(folder)
    with kept_on_drive(folder) as listener:
        assert {path.name for path in (folder / "model").iterdir()} >= {"config.json", "README.md"}
        assert not [*folder.glob("model/*.safetensors")]
        with pytest.raises(UserError, match=r"00002\.safetensors is missing; recompute it with"):
            open_run(folder)
        (folder / "report.md").write_text("mine")
        restored = run(finished_run.config, folder, listener)
    said = [line for line in capsys.readouterr().err.splitlines() if "recomputed" in line]
    assert [line.partition(":")[0] for line in said] == ["model"]
    assert restored.summary == finished_run.summary
    assert (folder / "report.md").read_text() == "mine"
    assert open_run(folder).stream("val").token_losses().isfinite().all()
    assert {path.name for path in on_drive.glob("*/*")} == archives


def test_an_archive_is_written_every_two_minutes_and_when_a_run_stops(on_drive, tmp_path, monkeypatch):
    clock, keep_all = Mock(return_value=0), Mock()
    monkeypatch.setattr(drive.time, "monotonic", clock)
    monkeypatch.setattr(drive, "keep_all", keep_all)
    written = []
    with suppress(KeyboardInterrupt), kept_on_drive(tmp_path / "run") as listener:
        for clock.return_value in (119, 121, 180, 242):
            listener({})
            written.append(keep_all.call_count)
        raise KeyboardInterrupt
    assert [*written, keep_all.call_count] == [0, 1, 1, 2, 3]


def test_finished_stages_win_over_a_state_that_was_not_deleted(on_drive, finished_run, tmp_path):
    """Simulate a machine that disappears before it deletes an outdated archive."""
    folder = tmp_path / "runs" / "run"
    shutil.copytree(finished_run.path, folder)
    with kept_on_drive(folder):
        pass
    (tmp_path / "old").write_text("{}")
    (copy,) = on_drive.iterdir()
    with tarfile.open(copy / "state-0.tar", "w") as tar:
        tar.add(tmp_path / "old", "metrics.jsonl")
    shutil.rmtree(folder)
    with kept_on_drive(folder):
        assert load_run(folder).summary == finished_run.summary


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "runs" / "run", 100)


def test_an_archive_that_cannot_be_restored_is_one_sentence_and_leaves_no_folder(on_drive, folder):
    with kept_on_drive(folder):
        pass
    for archive in on_drive.glob("*/settings-*.tar"):
        archive.write_bytes(b"torn")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"\.tar cannot be restored") as refused, kept_on_drive(folder):
        pass
    assert "\n" not in str(refused.value)
    assert not [*folder.parent.iterdir()]


def test_what_is_here_stays_and_what_a_full_drive_holds_too(on_drive, folder, monkeypatch, capsys):
    with kept_on_drive(folder):
        pass
    before = {path: path.read_bytes() for path in on_drive.glob("*/*")}
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    record = RunFolder.read(folder)
    record.write("test", Record({"code": "different"}))
    with kept_on_drive(folder):
        assert RunFolder.read(folder).records["test"].made_from == {"code": "different"}
    out = capsys.readouterr().out
    assert re.fullmatch(
        r"Google Drive refused test-\w+\.tar \(No space left .*\); training continues\.\n", out
    )
    kept = {path: path.read_bytes() for path in on_drive.glob("*/*")}
    assert (
        kept.items()
        == {path: content for path, content in before.items() if "/test-" not in str(path)}.items()
    )


def test_folders_of_one_name_have_copies_of_their_own_also_in_the_home_folder(
    on_drive, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for place, samples in (("a", 100), ("b", 500)):
        write_run(tmp_path / place / "run", samples)
    with kept_on_drive("~/a/run", tmp_path / "b" / "run"):
        pass
    for place in ("a", "b"):
        shutil.rmtree(tmp_path / place)
    with kept_on_drive("~/a/run", tmp_path / "b" / "run"):
        assert [load_run(tmp_path / place / "run").config.data.samples for place in "ab"] == [100, 500]
