"""Runs are kept in Google Drive as plain copies, from which another machine continues."""

import errno
import json
import shutil
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import outcome, stop_at
from disturbances import in_child
from toy_runs import EPOCHS, STATE, A, summary_of

from ctxkv_lib.experiments import run
from ctxkv_lib.files import read_json
from ctxkv_lib.runs import drive, training
from ctxkv_lib.runs.drive import kept_on_drive
from ctxkv_lib.runs.opened import open_run


@pytest.fixture
def on_drive(tmp_path, monkeypatch, own_store):
    """Keep copies in a folder, after every metric."""
    monkeypatch.setenv("CTXKV_DRIVE", str(tmp_path / "drive"))
    monkeypatch.setattr(drive, "SAVE_SECONDS", 0)
    return tmp_path / "drive"


def lose_machine(tmp_path, path):
    """Delete what a machine had locally, as if Colab had disconnected it."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(tmp_path / "store", ignore_errors=True)


def test_a_run_on_a_new_machine_continues_from_what_drive_has(on_drive, tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(training, "EVERY_SECONDS", 0)
    config = tiny_config.replace({"data.table": "cooccurrence"})
    monkeypatch.delenv("CTXKV_DRIVE")
    undisturbed = run(config, tmp_path / "undisturbed")
    monkeypatch.setenv("CTXKV_DRIVE", str(on_drive))
    path, heard = tmp_path / "runs" / "run", []
    with pytest.raises(KeyboardInterrupt):
        run(config, path, stop_at("phase2", 2))
    (copy,) = on_drive.iterdir()
    assert {file.name for file in copy.iterdir()} == {"run", "store"}
    lose_machine(tmp_path, path)
    run(config, path, heard.append)
    assert [line["epoch"] for line in heard if "val_ppl" in line and "replayed" not in line] == [3]
    assert not [*(copy / "store").glob("[!.]*")]  # its contexts are not needed any more
    lose_machine(tmp_path, path)
    finished = run(config, path)
    kept, expected = outcome(path), outcome(undisturbed.path)
    assert kept == expected
    assert open_run(finished).stream("val").token_losses().exp().mean() > 1


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", ["kill", "full"])
def test_a_machine_that_is_lost_at_any_moment_loses_no_saved_epoch(on_drive, tmp_path, kind, stride):
    path, expected = tmp_path / "runs" / "run", A.run(tmp_path / "alone")
    shutil.rmtree(on_drive)
    total = in_child(lambda: A.run(path)).operations
    assert total > 100
    continued = 0
    for at in range(stride // 2, total, stride):
        lose_machine(tmp_path, path)
        shutil.rmtree(on_drive, ignore_errors=True)
        in_child(lambda: A.run(path), kind, at)
        lose_machine(tmp_path, path)
        saved = [read_json(file)["epochs"] for file in on_drive.glob(f"*/run/{STATE}")]
        in_child(lambda: A.run(path), "kill", at % 20)  # lost once more, while it restores
        lose_machine(tmp_path, path)
        ended = in_child(lambda: A.run(path))
        assert ended.how == "done", ended
        assert ended.value == expected
        assert summary_of(path) == expected
        epochs = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert len([line for line in epochs if "epoch" in line]) == EPOCHS
        continued += bool(saved and len(saved[0]) < EPOCHS)
    assert continued  # some of the machines were lost within Phase 2


def test_a_copy_is_updated_every_two_minutes_and_when_a_run_stops(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXKV_DRIVE", str(tmp_path / "drive"))
    clock, keep = Mock(return_value=0), Mock()
    monkeypatch.setattr(drive.time, "monotonic", clock)
    monkeypatch.setattr(drive, "keep", keep)
    written = []
    with suppress(KeyboardInterrupt), kept_on_drive(tmp_path / "run", list, lambda _: None) as listener:
        for clock.return_value in (119, 121, 180, 242):
            listener({})
            written.append(keep.call_count)
        raise KeyboardInterrupt
    assert [*written, keep.call_count] == [0, 1, 1, 2, 3]


def test_what_is_here_stays_and_a_full_drive_only_prints_a_message(on_drive, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run"
    A.run(path)
    before = {file: file.read_bytes() for file in on_drive.rglob("*") if file.is_file()}
    (path / "report.md").write_text("mine")
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(shutil, "copy2", full)
    A.run(path)
    assert (path / "report.md").read_text() == "mine"
    said = capsys.readouterr().err
    assert "Google Drive refused a copy (No space left on device); training continues." in said
    assert {file: file.read_bytes() for file in on_drive.rglob("*") if file.is_file()} == before


def test_folders_of_one_name_have_copies_of_their_own_also_in_the_home_folder(
    on_drive, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("a", "b"):
        (tmp_path / place / "run" / "steps").mkdir(parents=True)
        (tmp_path / place / "run" / "steps" / "test.json").write_text(place)
        (tmp_path / place / "run" / "report.md").write_text(place)
        with kept_on_drive(Path("~").expanduser() / place / "run", list, lambda _: None):
            pass
    for place in ("a", "b"):
        shutil.rmtree(tmp_path / place)
        drive.restore(tmp_path / place / "run")
        assert (tmp_path / place / "run" / "report.md").read_text() == place
