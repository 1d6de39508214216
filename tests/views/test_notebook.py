"""Runs in Google Drive: nothing complete is ever lost to less, whatever is killed, torn or full."""

import errno
import json
import shutil
import tarfile
import time
from unittest.mock import Mock

import pytest
from disturbed_runs import outcome
from drawn import Clock
from sample_runs import sample_run

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.files import write_json, write_text
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.views import notebook
from ctxkv_lib.views.notebook import DriveCopies, kept_on_drive


@pytest.fixture(autouse=True)
def on_drive(monkeypatch, tmp_path):
    monkeypatch.setenv("CTXKV_DRIVE", str(tmp_path / "drive"))
    return tmp_path / "drive"


def half_run(folder, lines):
    """A run that has come as far as `lines` metrics."""
    write_json(folder / "config.json", build_config("ci").to_dict())
    write_text(folder / "metrics.jsonl", '{"stage": "phase1"}\n' * lines)
    return folder


def finished_run(folder):
    """A run with everything that a finished one has, in name."""
    sample_run(folder)
    for name in notebook.LANDMARKS:
        write_text(folder / name, name)
    return folder


def save(*folders):
    with kept_on_drive(*folders):
        pass


def held(on_drive, name="run"):
    with tarfile.open(on_drive / f"{name}.tar") as tar:
        return sorted(member.name for member in tar.getmembers() if member.isfile())


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_comes_back_as_it_was_after_an_interrupt(on_drive, tmp_path):
    folder = half_run(tmp_path / "runs" / "run", 3)
    (folder / "linked.json").symlink_to(folder / "config.json")

    def interrupted():
        with kept_on_drive(folder):
            write_text(folder / "checkpoint" / "half.txt", "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in on_drive.iterdir()] == ["run.tar"]
    before = files_of(folder)
    shutil.rmtree(folder)
    with kept_on_drive(folder):
        assert files_of(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_without_drive_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("CTXKV_DRIVE")
    half_run(tmp_path / "run", 1)
    heard = []
    with kept_on_drive(tmp_path / "run", listener=heard.append) as listener:
        listener({"stage": "phase1"})
    assert heard == [{"stage": "phase1"}]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_folders_may_be_text_and_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CTXKV_DRIVE", "~/mine")
    monkeypatch.chdir(tmp_path)
    half_run(tmp_path / "run", 1)
    save("~/run")
    assert "config.json" in " ".join(held(tmp_path / "mine"))


def test_a_machine_taken_back_in_the_middle_costs_no_finished_epoch(
    on_drive, tmp_path, tiny_config, monkeypatch
):
    """What Drive held when the machine was gone goes on elsewhere to the numbers of an undisturbed run."""
    folder, lost = tmp_path / "one" / "run", tmp_path / "lost"

    def watch(metric):
        if metric["stage"] == "phase2" and metric["epoch"] == 2 and not lost.exists():
            shutil.copytree(on_drive, lost)  # as the machine goes; no `finally` changes it any more

    with kept_on_drive(folder, listener=watch) as listener:
        undisturbed = run(tiny_config, folder, listener)
    assert len(undisturbed.summary["phase2"]["epochs"]) == 3

    monkeypatch.setenv("CTXKV_DRIVE", str(lost))
    elsewhere = tmp_path / "two" / "run"
    with kept_on_drive(elsewhere) as listener:
        assert set(json.loads((elsewhere / "checkpoint" / "stages.json").read_text())["stages"]) == {
            "phase1",
            "caches",
        }
        assert '"epoch": 1' in (elsewhere / "metrics.jsonl").read_text()
        run(tiny_config, elsewhere, listener)
    assert outcome(elsewhere) == outcome(folder)


def test_stages_are_saved_at_once_and_epochs_as_often_as_time_allows(on_drive, tmp_path, monkeypatch):
    now = Clock()
    monkeypatch.setattr(time, "monotonic", now)
    folder = half_run(tmp_path / "run", 1)
    copies = DriveCopies(on_drive, [folder], lambda _: None)

    def lines_held_after(lines, stage):
        write_text(folder / "metrics.jsonl", "{}\n" * lines)
        copies({"stage": stage})
        return notebook.archived_state(on_drive / "run.tar")["progress"][-1]

    assert lines_held_after(1, "phase1") == 1
    assert lines_held_after(2, "phase1") == 1
    assert lines_held_after(3, "phase2") == 3
    now.now += notebook.SAVE_SECONDS - 1
    assert lines_held_after(4, "phase2") == 3
    now.now += 2
    assert lines_held_after(5, "phase2") == 5


@pytest.mark.parametrize("lesser", ["without its model", "an older state"])
def test_a_lesser_state_never_replaces_a_fuller_archive(on_drive, tmp_path, lesser, capsys):
    folder = finished_run(tmp_path / "run")
    save(folder)
    full = (on_drive / "run.tar").read_bytes()
    if lesser == "without its model":
        shutil.rmtree(folder / "model")
    else:
        shutil.rmtree(folder)
        half_run(folder, 200)
    save(folder)
    assert (on_drive / "run.tar").read_bytes() == full
    assert capsys.readouterr().out.count("holds a fuller state") == 1


def test_a_finished_run_replaces_the_old_one_and_is_not_written_again_if_nothing_changed(
    on_drive, tmp_path, monkeypatch
):
    folder = finished_run(tmp_path / "run")
    save(folder)
    (folder / "metrics.jsonl").write_text("{}\n")  # fewer epochs, but finished as well
    save(folder)
    monkeypatch.setattr(notebook, "pack", None)
    save(folder)
    shutil.rmtree(folder)
    save(folder)
    assert (folder / "metrics.jsonl").read_text() == "{}\n"


def test_comparisons_are_kept_and_neither_hidden_files_nor_what_a_killed_save_left(on_drive, tmp_path):
    write_text(on_drive / ".a-vs-b.tar.7.part", "torn")
    write_json(tmp_path / "a-vs-b" / "comparison.json", {"runs": []})
    write_text(tmp_path / "a-vs-b" / ".comparison.json.7.part", "torn")
    write_text(tmp_path / "nothing" / "notes.txt", "no run")
    save(tmp_path / "a-vs-b", tmp_path / "nothing", tmp_path / "absent")
    assert [path.name for path in on_drive.iterdir()] == ["a-vs-b.tar"]
    assert held(on_drive, "a-vs-b") == [notebook.STATE, "a-vs-b/comparison.json"]
    shutil.copy(on_drive / "a-vs-b.tar", on_drive / "nothing.tar")
    save(tmp_path / "nothing")  # changes neither
    assert held(on_drive, "nothing") == held(on_drive, "a-vs-b")


def test_a_restore_that_fails_or_is_of_a_truncated_archive_leaves_no_run(on_drive, tmp_path, monkeypatch):
    folder = finished_run(tmp_path / "runs" / "run")
    save(folder)
    full = (on_drive / "run.tar").read_bytes()
    shutil.rmtree(folder)

    def torn(tar, member, path, filter):
        write_text(path / member.name, "torn")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", torn)
        with pytest.raises(UserError, match="No space left"):
            save(folder)
    assert list(folder.parent.iterdir()) == []
    assert (on_drive / "run.tar").read_bytes() == full
    with tarfile.open(on_drive / "run.tar") as tar:
        ends = [member.offset for member in tar.getmembers()]  # between members no header is torn
    (on_drive / "run.tar").write_bytes(full[: ends[-1]])
    with pytest.raises(UserError, match=r"run\.tar cannot be restored") as refused:
        save(folder)
    assert "\n" not in str(refused.value)
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"torn", bytes(10_240)], ids=["no archive", "an empty one"])
def test_an_archive_that_cannot_be_read_is_written_anew(on_drive, tmp_path, content):
    on_drive.mkdir()
    (on_drive / "run.tar").write_bytes(content)
    save(half_run(tmp_path / "run", 1))
    assert "run/config.json" in held(on_drive)


def test_members_cannot_leave_the_folder(on_drive, tmp_path):
    on_drive.mkdir()
    with tarfile.open(on_drive / "run.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("run/../../outside.txt"))
    with pytest.raises(UserError, match="outside the destination"):
        save(tmp_path / "runs" / "run")
    assert not [*tmp_path.rglob("outside.txt")]


def test_a_full_drive_is_one_calm_line_and_training_goes_on(on_drive, tmp_path, monkeypatch, capsys):
    folder = half_run(tmp_path / "run", 1)
    save(folder)
    before = (on_drive / "run.tar").read_bytes()

    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    heard = []
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        with kept_on_drive(folder, listener=heard.append) as listener:
            for stage in ("phase1", "phase2"):
                half_run(folder, len(heard) + 2)
                listener({"stage": stage})
    assert [metric["stage"] for metric in heard] == ["phase1", "phase2"]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "Google Drive did not take run.tar (No space left on device)" in printed
    assert [path.name for path in on_drive.iterdir()] == ["run.tar"]
    assert (on_drive / "run.tar").read_bytes() == before
    save(folder)
    assert (on_drive / "run.tar").read_bytes() != before
