import os
from pathlib import Path

import pytest
import torch
from conftest import flip

from ctxkv_lib import files
from ctxkv_lib.errors import DamagedFile
from ctxkv_lib.files import (
    checksum,
    digest,
    digest_of_lists,
    read_sealed_json,
    read_tensors,
    replacing,
    sweep,
    tensor_metadata,
    write_sealed_json,
    write_streamed,
    write_tensors,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "checksum": torch.zeros(0), "b": torch.ones(3).bfloat16()}


def written(path, **metadata):
    write_tensors(path, TENSORS, metadata)
    return path


def write_half(path, error):
    with replacing(path) as beside:
        beside.write_text("half")
        raise error


def test_tensors_and_strings_come_back_also_after_a_block_that_fails(tmp_path):
    path = written(tmp_path / "t", key="k", text='"checksum":"' + "0" * 32)
    found = read_tensors(path, key="k")
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    assert tensor_metadata(path) == {"key": "k", "text": '"checksum":"' + "0" * 32}
    before = checksum(path)
    with pytest.raises(ZeroDivisionError):
        write_half(path, ZeroDivisionError)
    assert checksum(path) == before
    assert os.listdir(tmp_path) == ["t"]


def test_files_can_be_read_by_whoever_may_read_others(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 0, 6], [4, 4]])
def test_a_streamed_tensor_comes_back(tmp_path, sizes):
    path = tmp_path / "a.safetensors"
    long = {"key": "k", "state": "é" * 20_000}
    rows = [torch.randn(size, 4).bfloat16() for size in sizes]
    whole = {
        "half": torch.randn(3).half(),
        "few": torch.arange(65_000, 65_007).to(torch.uint16),
        "flags": torch.tensor([True, False]),
    }

    def chunks():
        yield "count", torch.tensor(len(sizes))
        for each in rows:
            yield "rows", each.t().contiguous().t()
        yield from whole.items()

    write_streamed(path, chunks(), long)
    expected = {**whole, "count": torch.tensor(len(sizes)), **({"rows": torch.cat(rows)} if rows else {})}
    found = read_tensors(path, "k")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].tolist() == tensor.tolist()
    assert tensor_metadata(path) == long
    assert [*tmp_path.iterdir()] == [path]
    flip(path)
    with pytest.raises(DamagedFile, match="checksum differs"):
        read_tensors(path)


def test_a_sealed_object_comes_back_or_is_damaged(tmp_path):
    path = tmp_path / "sealed.json"
    write_sealed_json(path, {"a": [1, None], "ü": "é"})
    text = path.read_text(encoding="utf-8")
    assert read_sealed_json(path) == {"a": [1, None], "ü": "é"}
    for damage, reason in (
        (text.replace("1", "2"), "its checksum differs"),
        ("{}", "it has no checksum"),
        ("[" * 5000, "it is not JSON"),
    ):
        path.write_text(damage, encoding="utf-8")
        with pytest.raises(DamagedFile, match=reason):
            read_sealed_json(path)


@pytest.mark.parametrize("lists", [[[], []], [["a"], [[{"b": "é", "a": 1}], []]], [[1, 2, 3]]])
def test_the_digest_of_lists_that_are_read_once_is_that_of_the_whole(lists):
    assert digest_of_lists("head", *map(iter, lists)) == digest(["head", *lists])


def test_every_flipped_bit_and_every_cut_is_seen(tmp_path):
    content = written(tmp_path / "t", key="k").read_bytes()
    bad = tmp_path / "bad"
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        for damage in (bytes(flipped), content[:at]):
            bad.write_bytes(damage)
            with pytest.raises(DamagedFile, match=r"bad cannot be used: .*; run what made it"):
                read_tensors(bad)


def test_a_file_of_something_else_or_without_a_checksum_is_damaged(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(DamagedFile, match="made from something else"):
        read_tensors(written(tmp_path / "t", key="k"), key="other")
    save_file(TENSORS, tmp_path / "old", {"key": "k"})
    with pytest.raises(DamagedFile, match="no checksum"):
        read_tensors(tmp_path / "old")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none")


def test_reading_does_not_hold_the_file_in_memory(tmp_path):
    path = tmp_path / "t"
    write_tensors(path, {"a": torch.zeros(1 << 20)})
    tensor = read_tensors(path)["a"]
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in lines if str(path) in line]  # from, to
    assert any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in mapped)


def test_a_folder_replaces_a_folder_and_only_what_was_killed_is_swept(tmp_path, monkeypatch):
    for text in ("old", "new"):
        left = tmp_path / f".folder.{os.getpid()}.part" / "deep"  # by a process that had this one's number
        left.mkdir(parents=True)
        with replacing(tmp_path / "folder") as beside:
            (beside / "deep").mkdir(parents=True)
            (beside / "deep" / "file").write_text(text)
    assert os.listdir(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "deep" / "file").read_text() == "new"
    monkeypatch.setattr(files, "remove", lambda path: None)  # as if killed before it
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "folder" / "file", KeyboardInterrupt)
    monkeypatch.undo()
    for name in (".config.json.4.part", "folder/.t.5.part", ".5.part.txt", "6.part"):
        (tmp_path / name).write_text("half")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"file", ".5.part.txt", "6.part"}


def test_of_a_link_to_a_folder_the_link_is_removed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    files.remove(link)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
