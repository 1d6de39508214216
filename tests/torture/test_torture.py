"""The long form of the tests of trust in files; `make torture`. About half an hour on one core."""

import os
import random
import shutil
import subprocess
from collections import Counter

import pytest
from conftest import write_conversations
from disturbed_runs import DAMAGES, Laboratory, die, files_of, make_quick, swap, tables

pytestmark = pytest.mark.torture
KILLS = int(os.environ.get("CTXKV_KILLS", 100))
DAMAGED = int(os.environ.get("CTXKV_DAMAGED", 300))
FULL_DISKS = 20


@pytest.fixture(scope="module", params=["exact", "published"])
def laboratory(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield Laboratory(tmp_path_factory.mktemp(request.param), request.param)


def test_every_killed_run_ends_with_the_numbers_of_an_undisturbed_one(laboratory, tmp_path):
    draw, ended = random.Random(1), Counter()
    for number in range(KILLS // 2):
        out = tmp_path / str(number)
        changed_data = number % 5 == 4
        if changed_data:  # a finished run, and a run on other data that is killed in the same folder
            shutil.copytree(laboratory.reference, out)
            write_conversations(laboratory.data, 16, seed=number)
        if number % 2:
            killed = laboratory.run(out, kill_after=draw.uniform(0, laboratory.seconds))
        else:
            killed = laboratory.run_with(out, draw.randrange(2 * len(laboratory.renames)), die)
        ended[killed.code] += 1
        write_conversations(laboratory.data, 16)
        laboratory.check_run(out)
        shutil.rmtree(out)
    print(f"\nkilled: {ended}")


def test_damaged_files_are_repaired_refused_or_harmless(laboratory, tmp_path):
    draw, ended = random.Random(2), Counter()
    other = Laboratory(tmp_path, "exact", **{"runtime.seed": 7})
    begun = tmp_path / "begun"
    laboratory.run_with(begun, laboratory.after("checkpoint/phase2.safetensors") + 4, die)
    for number in range(DAMAGED // 2):
        damage = DAMAGES[number % len(DAMAGES)]
        source = (laboratory.reference, begun)[number // len(DAMAGES) % 2]
        out = tmp_path / "damaged"
        shutil.copytree(source, out)
        others = {file: other.reference / file.relative_to(out) for file in files_of(out)}
        if damage is swap:  # with a file that has other content
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


def test_damaged_tables_of_the_shared_cache_are_made_again(laboratory, tmp_path):
    draw = random.Random(3)
    for number, damage in enumerate(4 * DAMAGES):
        kept = tables()
        for table, other in zip(kept, [*kept[1:], *kept[:1]], strict=True):
            damage(table, draw, other)
        laboratory.check_run(tmp_path / str(number))


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_sentence_and_the_rerun_ends_right(laboratory, disk):
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


def test_a_read_only_folder_is_one_sentence(laboratory, disk):
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
