"""Files are complete and intact, or absent."""

from pathlib import Path

import pytest
import torch
from conftest import cut

from ctxkv_lib.errors import DamagedFile
from ctxkv_lib.files import (
    read_tensors,
    replacing,
    runs_root,
    write_tensors,
    write_text,
)


def test_the_runs_folder_is_here_or_in_the_clone_or_where_the_environment_says(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert runs_root() == Path("runs")
    (tmp_path / "ctxkv_lib").mkdir()
    (tmp_path / "ctxkv_lib" / "__init__.py").touch()
    assert runs_root() == tmp_path / "runs"
    monkeypatch.setenv("CTXKV_RUNS", str(tmp_path / "elsewhere"))
    assert runs_root() == tmp_path / "elsewhere"


def test_a_file_or_folder_is_replaced_completely_or_not_at_all(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError), replacing(tmp_path / "new" / "a.txt") as beside:
        beside.write_text("\udcff", encoding="utf-8")  # fails while the file is open
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ["old"]
    with replacing(tmp_path / "new") as beside:
        beside.mkdir()
        (beside / "b.txt").write_text("b")
        (beside / "b.txt").chmod(0o600)  # as safetensors does
    assert (tmp_path / "new" / "b.txt").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "b.txt"]


def test_two_writers_of_one_file_never_share_a_temporary_file(tmp_path):
    """The names also differ if processes in different containers have the same process id."""
    with replacing(tmp_path / "a.txt") as first, replacing(tmp_path / "a.txt") as second:
        first.write_text("first")
        second.write_text("second")
        assert first.read_text() == "first"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_tensors_are_read_as_written_and_a_cut_file_is_refused(tmp_path):
    weight = torch.randn(5, 3)
    tensors = {"weight": weight, "tied": weight, "turned": weight.T, "none": torch.ones(0, 4)}
    tensors |= {"count": torch.tensor(3), "ids": torch.tensor([1, 65535], dtype=torch.uint16)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    found = read_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert torch.equal(found[name], expected)
    del found  # the tensors map the file
    cut(tmp_path / "t.safetensors")
    with pytest.raises(DamagedFile, match=r"t\.safetensors cannot be used: .*run the command"):
        read_tensors(tmp_path / "t.safetensors")
