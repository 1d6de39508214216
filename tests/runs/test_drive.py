"""Copies of run folders in Google Drive."""

import errno
import shutil
import tarfile
from contextlib import suppress
from unittest.mock import Mock

import pytest
from conftest import stop_at

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.runs import drive
from ctxkv_lib.runs.drive import kept_on_drive


@pytest.fixture
def on_drive(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXKV_DRIVE", str(tmp_path / "drive"))
    return tmp_path / "drive"


def test_a_run_on_a_new_machine_goes_on_from_what_drive_holds(on_drive, tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(drive, "SAVE_SECONDS", 0)
    undisturbed = run(tiny_config, tmp_path / "undisturbed")
    folder = tmp_path / "runs" / "run"

    def interrupted():
        with kept_on_drive(folder, listener=stop_at("phase2", 2)) as listener:
            run(tiny_config, folder, listener)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (archive,) = on_drive.iterdir()
    shutil.rmtree(folder)
    with kept_on_drive(folder) as listener:
        assert '"phase1"' in (folder / "metrics.jsonl").read_text()
        finished = run(tiny_config, folder, listener)
    ppls = [
        [line["val_ppl"] for line in each.summary["phase2"]["epochs"]] for each in (undisturbed, finished)
    ]
    assert ppls[0] == pytest.approx(ppls[1])
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    assert "./summary.json" in names
    assert not [name for name in names if "/." in name]


def test_an_archive_is_written_every_two_minutes_and_when_a_run_stops(on_drive, tmp_path, monkeypatch):
    clock, pack_all = Mock(return_value=0), Mock()
    monkeypatch.setattr(drive.time, "monotonic", clock)
    monkeypatch.setattr(drive, "pack_all", pack_all)
    written = []
    with suppress(KeyboardInterrupt), kept_on_drive(tmp_path / "run") as listener:
        for clock.return_value in (119, 121, 180, 242):
            listener({})
            written.append(pack_all.call_count)
        raise KeyboardInterrupt
    assert [*written, pack_all.call_count] == [0, 1, 1, 2, 3]


def test_an_archive_that_cannot_be_restored_is_one_sentence_and_leaves_no_folder(on_drive, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with kept_on_drive(folder):
        pass
    (archive,) = on_drive.iterdir()
    archive.write_bytes(b"torn")
    folder.rmdir()
    with pytest.raises(UserError, match=r"\.tar cannot be restored") as refused, kept_on_drive(folder):
        pass
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["drive"]


def test_what_is_here_stays_and_what_a_full_drive_holds_too(on_drive, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    with kept_on_drive(folder):
        pass
    (archive,) = on_drive.iterdir()
    before = archive.read_bytes()
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    (folder / "config.json").write_text("new")
    with kept_on_drive(folder):
        assert (folder / "config.json").read_text() == "new"
    assert capsys.readouterr().out == (
        f"Google Drive did not take {archive.name} (No space left on device); training goes on.\n"
    )
    assert archive.read_bytes() == before


def test_folders_of_one_name_have_archives_of_their_own_also_in_the_home_folder(
    on_drive, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("a", "b"):
        (tmp_path / place / "run").mkdir(parents=True)
        (tmp_path / place / "run" / "config.json").write_text(place)
    with kept_on_drive("~/a/run", tmp_path / "b" / "run"):
        pass
    for place in ("a", "b"):
        shutil.rmtree(tmp_path / place)
    with kept_on_drive("~/a/run", tmp_path / "b" / "run"):
        assert [(tmp_path / place / "run" / "config.json").read_text() for place in "ab"] == ["a", "b"]
