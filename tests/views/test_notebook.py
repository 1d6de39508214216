"""Runs in Google Drive: nothing complete is ever lost to less, whatever is killed, torn or full."""

import contextlib
import errno
import io
import json
import shutil
import tarfile
from pathlib import Path
from unittest.mock import Mock

import pytest
from disturbed_runs import outcome
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


def test_stages_are_saved_at_once_and_epochs_as_often_as_time_allows(on_drive, tmp_path):
    now = [0.0]
    folder = half_run(tmp_path / "run", 1)
    copies = DriveCopies(on_drive, [folder], lambda _: None, clock=lambda: now[0])

    def lines_held_after(lines, stage):
        write_text(folder / "metrics.jsonl", "{}\n" * lines)
        copies({"stage": stage})
        return notebook.archived_state(on_drive / "run.tar")["progress"][-1]

    assert lines_held_after(1, "phase1") == 1
    assert lines_held_after(2, "phase1") == 1
    assert lines_held_after(3, "phase2") == 3
    now[0] += notebook.SAVE_SECONDS - 1
    assert lines_held_after(4, "phase2") == 3
    now[0] += 2
    assert lines_held_after(5, "phase2") == 5


@pytest.mark.parametrize("lesser", ["fragment", "without its model", "an older state"])
def test_a_lesser_state_never_replaces_a_fuller_archive(on_drive, tmp_path, lesser, capsys):
    folder = finished_run(tmp_path / "run")
    save(folder)
    full = (on_drive / "run.tar").read_bytes()
    if lesser == "without its model":
        shutil.rmtree(folder / "model")
    else:
        shutil.rmtree(folder)
        half_run(folder, 1 if lesser == "fragment" else 200)
    save(folder)
    assert (on_drive / "run.tar").read_bytes() == full
    assert capsys.readouterr().out.count("holds a fuller state") == 1


def test_a_finished_run_that_was_made_again_replaces_the_old_one(on_drive, tmp_path):
    folder = finished_run(tmp_path / "run")
    save(folder)
    (folder / "metrics.jsonl").write_text("{}\n")  # fewer epochs, but finished as well
    save(folder)
    shutil.rmtree(folder)
    save(folder)
    assert (folder / "metrics.jsonl").read_text() == "{}\n"


def test_what_has_not_changed_is_not_written_again(on_drive, tmp_path, monkeypatch):
    folder = finished_run(tmp_path / "run")
    save(folder)
    monkeypatch.setattr(notebook, "pack", None)
    save(folder)
    shutil.rmtree(folder)
    save(folder)
    assert folder.is_dir()


def test_comparisons_are_kept_and_hidden_files_are_not(on_drive, tmp_path):
    write_json(tmp_path / "a-vs-b" / "comparison.json", {"runs": []})
    write_text(tmp_path / "a-vs-b" / ".comparison.json.7.part", "torn")
    write_text(tmp_path / "nothing" / "notes.txt", "no run")
    save(tmp_path / "a-vs-b", tmp_path / "nothing", tmp_path / "absent")
    assert [path.name for path in on_drive.iterdir()] == ["a-vs-b.tar"]
    assert held(on_drive, "a-vs-b") == [notebook.STATE, "a-vs-b/comparison.json"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_restore_leaves_nothing_that_counts_as_a_run(on_drive, tmp_path, monkeypatch, stop):
    folder = finished_run(tmp_path / "runs" / "run")
    save(folder)
    full = (on_drive / "run.tar").read_bytes()
    shutil.rmtree(folder)

    def torn(tar, member, path, filter):
        path.mkdir(exist_ok=True)
        (path / member.name).write_text("torn")
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", torn)
        with pytest.raises((KeyboardInterrupt, UserError)):
            save(folder)
    assert list(folder.parent.iterdir()) == []
    assert (on_drive / "run.tar").read_bytes() == full
    write_text(folder.parent / ".run.7.part" / "rest.txt", "of a restore that was killed")
    write_text(on_drive / ".run.tar.7.part", "of a save that was killed")
    save(folder)
    assert (folder / "model" / "model.safetensors").is_file()
    assert not (folder / "rest.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    write_text(folder / "metrics.jsonl", "{}\n")
    save(folder)
    assert [path.name for path in on_drive.iterdir()] == ["run.tar"]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_archive_is_refused_in_a_sentence(on_drive, tmp_path, share):
    folder = finished_run(tmp_path / "runs" / "run")
    save(folder)
    archive = on_drive / "run.tar"
    with tarfile.open(archive) as tar:
        ends = [member.offset for member in tar.getmembers()]  # between members no header is torn
    archive.write_bytes(archive.read_bytes()[: ends[int(share * len(ends))]])
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"run\.tar cannot be restored") as refused:
        save(folder)
    assert "\n" not in str(refused.value)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["../outside.txt", "run/../../outside.txt", "/outside.txt", "link"])
def test_members_cannot_leave_the_folder(on_drive, tmp_path, name):
    on_drive.mkdir()
    with tarfile.open(on_drive / "run.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("run/first.txt"))
        member = tarfile.TarInfo("run/link" if name == "link" else name)
        member.size = 4
        if name == "link":
            member.type, member.linkname, member.size = tarfile.SYMTYPE, str(tmp_path), 0
        tar.addfile(member, io.BytesIO(b"evil"))
        inside = tarfile.TarInfo("run/link/outside.txt")
        inside.size = 4
        tar.addfile(inside, io.BytesIO(b"evil"))
    with contextlib.suppress(UserError):  # an absolute name is taken as one inside
        save(tmp_path / "runs" / "run")
    outside = {*tmp_path.rglob("outside.txt"), *Path("/").glob("outside.txt")}
    assert not [path for path in outside if tmp_path / "runs" / "run" not in path.parents]


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
