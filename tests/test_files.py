"""Files are complete and intact, or absent."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ctxkv_lib.errors import DamagedFile
from ctxkv_lib.files import (
    checksums,
    digest,
    read_json,
    read_tensors,
    read_with_metadata,
    replacing,
    write_parts,
    write_tensors,
    write_text,
)


def test_a_file_or_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "old")
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "new" / "a.txt") as beside:
        beside.with_name("..").write_text("fails")
    assert (tmp_path / "new" / "a.txt").read_text() == "old"
    with replacing(tmp_path / "new") as beside:
        beside.mkdir()
        (beside / "b.txt").write_text("b")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "b.txt"]


def test_tensors_and_strings_come_back_and_damage_is_found(tmp_path, damage):
    weight = torch.randn(5, 3)
    tensors = {
        "weight": weight,
        "tied": weight,
        "turned": weight.T,
        "count": torch.tensor(3),
        "none": torch.ones(0, 4),
    }
    tensors["ids"] = torch.tensor([1, 65535], dtype=torch.uint16)
    write_tensors(tmp_path / "t.safetensors", tensors, {"key": "é"})
    found, metadata = read_with_metadata(tmp_path / "t.safetensors")
    assert metadata["key"] == "é"
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert torch.equal(found[name], expected)
    del found  # mapped
    damage(tmp_path / "t.safetensors")
    with pytest.raises(DamagedFile, match=r"t\.safetensors cannot be used: .*run what made it again"):
        read_tensors(tmp_path / "t.safetensors")


def test_a_tensor_written_in_parts_is_the_one_written_at_once(tmp_path):
    rows = torch.randn(1000, 7)
    ids = torch.arange(1001)
    parts = {
        "contexts": (torch.bfloat16, (1000, 7), rows.split(13)),
        "ids": (torch.int32, (1001,), [ids]),
        "none": (torch.float32, (9, 0), []),
    }
    write_parts(tmp_path / "p.safetensors", parts)
    for read in (load_file, read_tensors):
        found = read(tmp_path / "p.safetensors")
        assert torch.equal(found["contexts"], rows.bfloat16())
        assert torch.equal(found["ids"], ids.int())
        assert found["none"].shape == (9, 0)


def test_checksums_and_digests_change_with_what_they_are_of(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "b")
    write_text(tmp_path / "c.txt", "c")
    before = checksums(tmp_path, [tmp_path / "a", tmp_path / "c.txt"])
    assert list(before) == ["a/b.txt", "c.txt"]
    write_text(tmp_path / "c.txt", "C")
    after = checksums(tmp_path, [tmp_path / "a", tmp_path / "c.txt"])
    assert [name for name in before if before[name] != after[name]] == ["c.txt"]
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_damage(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedFile, match="it is not JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps([1]))
    assert read_json(tmp_path / "a.json") == [1]
