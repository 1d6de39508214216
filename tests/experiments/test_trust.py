"""Runs reach the right numbers after any damage, or say why not in a sentence; `make torture` tries more."""

import os
import random
import shutil
import subprocess
from collections import Counter

import pytest
from conftest import cut, flip, outcome, write_conversations
from disturbed_runs import DAMAGES, Laboratory, delete, files_of, generate, in_child, make_quick, swap

from ctxkv_lib.cli import main
from ctxkv_lib.errors import UserError
from ctxkv_lib.runs.opened import open_run

KILLS = int(os.environ.get("CTXKV_KILLS", 100))
DAMAGED = int(os.environ.get("CTXKV_DAMAGED", 300))
FULL_DISKS = 20


@pytest.fixture(scope="module")
def laboratory(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield Laboratory(tmp_path_factory.mktemp("laboratory"), getattr(request, "param", "exact"))


def torture(test):
    """Mark a test that only `make torture` runs, with two recipes."""
    recipes = pytest.mark.parametrize("laboratory", ["exact", "published"], indirect=True, scope="module")
    return pytest.mark.torture(recipes(test))


@pytest.fixture
def copy(laboratory, tmp_path):
    """Return a copy of a finished run, to be damaged."""
    return shutil.copytree(laboratory.reference, tmp_path / "run")


@pytest.fixture(scope="module")
def begun(laboratory):
    """Return a run that was killed in Phase 2 while it saved its state for the second time."""
    out = laboratory.root / "begun"
    laboratory.killed_at(out, laboratory.after("checkpoint/phase2.pt") + 1)
    return out


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("checkpoint/contexts.json", 1),
        ("config.json", 1),
        ("checkpoint/context_block.safetensors", 0),
        ("model", 1),
    ],
)
def test_a_killed_run_ends_with_the_numbers_of_an_undisturbed_one(laboratory, tmp_path, name, before):
    killed = laboratory.killed_at(tmp_path / "run", laboratory.after(name) - before)
    assert killed.code == -9
    laboratory.check_run(tmp_path / "run")


def test_a_record_is_used_only_with_the_files_it_was_made_with(laboratory, tmp_path):
    """Kill a run; kill a run on another text before its record is written; resume with the first text."""
    out = tmp_path / "run"
    laboratory.killed_at(out, laboratory.after("checkpoint/weights.safetensors") - 1)
    write_conversations(laboratory.data, 16, seed=1)
    killed = laboratory.killed_at(out, laboratory.after("caches/val_emb.safetensors"))
    write_conversations(laboratory.data, 16)
    assert killed.code == -9
    laboratory.check_run(out)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("caches/train_emb.safetensors", cut, "train_emb.safetensors is damaged"),
        ("caches/val_ctx.safetensors", delete, "contexts: recomputed, since"),
        ("checkpoint/context_block.safetensors", cut, "context_block.safetensors is damaged"),
        ("checkpoint/weights.safetensors", delete, "phase2: recomputed, since"),
        ("checkpoint/phase2.json", delete, "record is lost"),
        ("checkpoint/contexts.json", flip, "contexts.json is damaged"),
        ("summary.json", flip, "summary.json is damaged"),
        ("figures/memory.png", delete, "Best epoch"),
    ],
)
def test_damage_is_repaired_with_the_same_numbers(laboratory, copy, name, damage, said):
    damage(copy / name, random.Random(1), copy / "checkpoint/context_block.safetensors")
    read = in_child(lambda: main(["report", str(copy)]))
    assert read == laboratory.report or (read.is_a_sentence and str(copy) in read.text)
    again = ["--again"] if "record is lost" in said else []
    if again:
        refused = laboratory.run(copy)
        assert refused.is_a_sentence
        assert said in refused.text
        assert in_child(lambda: main([*laboratory.arguments, "--out", str(copy), "--again"])).code == 0
        said = "reused"
    assert said in laboratory.check_run(copy).text


def test_changed_contents_of_a_finished_run_are_noticed_when_they_are_read(laboratory, copy):
    flip(copy / "caches/val_ctx.safetensors")
    assert in_child(lambda: generate(copy)) == laboratory.text  # `generate` reads no cache
    laboratory.check_run(copy)
    with pytest.raises(UserError, match=r"val_ctx\.safetensors is damaged; recompute it with .* --again"):
        open_run(copy).stream("val").token_losses()
    repaired = in_child(lambda: main([*laboratory.arguments, "--out", str(copy), "--again"]))
    assert "contexts: recomputed, since" in repaired.text
    assert "phase2: reused." in repaired.text
    assert open_run(copy).stream("val").token_losses().isfinite().all()


def test_an_edited_report_is_kept(laboratory, copy):
    (copy / "report.md").write_text("mine")
    laboratory.check_run(copy)
    assert (copy / "report.md").read_text() == "mine"
    assert in_child(lambda: generate(copy)) == laboratory.text


@pytest.mark.parametrize("name", ["caches/train_ctx.safetensors", "checkpoint/phase2.pt"])
def test_an_unfinished_run_resumes_without_options_even_if_damaged(laboratory, begun, tmp_path, name):
    out = shutil.copytree(begun, tmp_path / "run")
    os.truncate(out / name, 50)
    done = in_child(lambda: main(["run", "--out", str(out)]))
    assert done.code == 0, done.text
    assert outcome(out) == laboratory.expected


@torture
def test_every_killed_run_ends_with_the_numbers_of_an_undisturbed_one(laboratory, tmp_path):
    draw, ended = random.Random(1), Counter()
    for number in range(KILLS // 2):
        out = tmp_path / str(number)
        if number % 5 == 4:  # first, kill a run on other data in `out`
            write_conversations(laboratory.data, 16, seed=number)
            laboratory.killed_at(out, draw.randrange(len(laboratory.renames)))
            write_conversations(laboratory.data, 16)
        if number % 2:
            killed = laboratory.run(out, kill_after=draw.uniform(0, laboratory.seconds))
        else:
            killed = laboratory.killed_at(out, draw.randrange(2 * len(laboratory.renames)))
        ended[killed.code] += 1
        laboratory.check_run(out)
        shutil.rmtree(out)
    print(f"\nkilled: {ended}")


@torture
def test_damaged_files_are_repaired_refused_or_harmless(laboratory, tmp_path):
    draw, ended = random.Random(2), Counter()
    other = Laboratory(tmp_path, "exact", **{"runtime.seed": 7})
    begun = tmp_path / "begun"
    laboratory.killed_at(begun, laboratory.after("checkpoint/phase2.pt") + 4)
    for number in range(DAMAGED // 2):
        damage = DAMAGES[number % len(DAMAGES)]
        source = (laboratory.reference, begun)[number // len(DAMAGES) % 2]
        out = tmp_path / "damaged"
        shutil.copytree(source, out)
        others = {file: other.reference / file.relative_to(out) for file in files_of(out)}
        if damage is swap:  # swap only files that differ
            others = {f: o for f, o in others.items() if o.is_file() and f.read_bytes() != o.read_bytes()}
        victim = draw.choice(list(others))
        damage(victim, draw, others[victim])
        try:
            ended[damage.__name__, laboratory.check_damaged(out)] += 1
        except AssertionError:
            print(f"{source.name}: {damage.__name__} of {victim}")
            raise
        shutil.rmtree(out)
    print(f"\ndamaged: {ended}")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@torture
def test_a_full_disk_prints_one_sentence_and_a_rerun_reaches_the_right_numbers(laboratory, disk):
    size = sum(path.stat().st_size for path in files_of(laboratory.reference))
    for number in range(FULL_DISKS):
        out = disk / str(number)
        _resize(disk, int(size * (number + 0.5) / FULL_DISKS))
        stopped = laboratory.run(out)
        assert stopped.is_a_sentence, stopped
        assert "disk is full" in stopped.text
        assert not [*disk.rglob("*.part")]
        _resize(disk, 3 * size)
        laboratory.check_run(out)
        shutil.rmtree(out)


@torture
def test_a_read_only_folder_is_refused_in_one_sentence(laboratory, disk):
    _resize(disk, 1 << 26)
    out = disk / "run"
    shutil.copytree(laboratory.reference, out)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for folder in (out, disk / "new"):
        refused = laboratory.run(folder)
        assert refused.is_a_sentence, refused
        assert "Read-only" in refused.text
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    laboratory.check_run(out)


def _resize(disk, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
