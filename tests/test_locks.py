import os
import subprocess
import sys

import pytest
from filelock import FileLock

from ctxkv_lib.errors import DamagedFile, UserError
from ctxkv_lib.files import cache_dir, replacing, write_text
from ctxkv_lib.locks import made_once, only_process

HOLD = """
import sys, time
from pathlib import Path
from ctxkv_lib.locks import only_process
with only_process(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"held\n"
        refused = pytest.raises(UserError, match=rf"is in use by process {first.pid} on ")
        with refused, only_process(tmp_path):
            pass
    finally:
        first.kill()  # no time to release anything
        first.wait()
    with only_process(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_folder_that_cannot_be_made_is_one_sentence_with_its_name(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("CTXKV_CACHE", str(file))
    with pytest.raises(UserError, match=r"file cannot be made .*; set \$CTXKV_CACHE to a folder"):
        made_once((file / "table").read_text, None)
    refused = pytest.raises(
        UserError, match=r"cannot be made .*; name another folder with --out or \$CTXKV_RUNS"
    )
    with refused, only_process(file / "run"):
        pass


def test_the_shared_cache_is_in_the_home_folder_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("", "~/.cache/ctxkv"):
        monkeypatch.setenv("CTXKV_CACHE", name)
        assert cache_dir() == tmp_path / ".cache" / "ctxkv"
    monkeypatch.setattr("os.path.expanduser", str)  # as of a user whom the system does not know
    with pytest.raises(UserError, match=r"no home folder for ~/.cache/ctxkv; set \$CTXKV_CACHE to a folder"):
        cache_dir()


@pytest.mark.usefixtures("own_cache")
def test_the_shared_cache_is_filled_by_one_process():
    """Two that want the same: the slower one reads what the other made."""
    script = """
import time
from pathlib import Path
from ctxkv_lib.files import cache_dir, write_text
from ctxkv_lib.locks import made_once
path = cache_dir() / "table"
def make():
    print("made")
    time.sleep(0.5)
    write_text(path, "made")
print(made_once(path.read_text, make))
"""
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in "ab"]
    assert sorted(each.communicate()[0] for each in both) == ["made\n", "made\nmade\n"]


def test_what_is_made_may_need_something_else_that_is_made(tmp_path, monkeypatch):
    """While the first is half written; and the lock is free afterwards."""
    monkeypatch.setenv("CTXKV_CACHE", str(tmp_path))
    inner, outer = tmp_path / "inner", tmp_path / "outer"

    def make():
        with replacing(outer) as beside:
            beside.write_text(made_once(inner.read_text, lambda: write_text(inner, "made")))

    assert made_once(outer.read_text, make) == "made"
    with FileLock(tmp_path / ".lock").acquire(timeout=0):
        pass


def test_filling_the_cache_leaves_alone_what_a_run_below_it_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXKV_CACHE", str(tmp_path))
    table, left = tmp_path / "table", tmp_path / ".other.77.part"
    (tmp_path / "runs").mkdir()
    left.touch()
    with replacing(tmp_path / "runs" / "state") as beside:
        beside.write_text("state")
        made_once(table.read_text, lambda: write_text(table, "made"))
    assert (tmp_path / "runs" / "state").read_text() == "state"
    assert not left.exists()


def test_what_is_damaged_is_removed_and_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CTXKV_CACHE", str(tmp_path))
    path = tmp_path / "table"
    path.write_text("damaged")

    def read():
        if path.read_text() == "damaged":
            raise DamagedFile(path, "its checksum differs")
        return path.read_text()

    assert made_once(read, lambda: path.write_text(str(path.exists()))) == "False"
    assert capsys.readouterr().err == f"{path} cannot be used: its checksum differs; it is made again.\n"
