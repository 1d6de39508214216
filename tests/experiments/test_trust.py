"""Runs end right whatever was lost, and say what; `make torture` runs the long form, half an hour."""

import json
import os
import random
import shlex
import shutil
import subprocess
from collections import Counter

import pytest
from conftest import cut, flip, write_conversations
from disturbed_runs import DAMAGES, Laboratory, delete, files_of, in_child, make_quick, outcome, swap, tables

from ctxkv_lib.cli import main
from ctxkv_lib.errors import DamagedFile, UserError
from ctxkv_lib.files import read_sealed_json, write_sealed_json
from ctxkv_lib.locks import only_process
from ctxkv_lib.runs import contexts, stages, work
from ctxkv_lib.runs.config import config_from_dict
from ctxkv_lib.runs.provenance import PRECISIONS
from ctxkv_lib.runs.records import Records
from ctxkv_lib.runs.run_folder import RunFolder

STAGES = "checkpoint/stages.json"
KILLS = int(os.environ.get("CTXKV_KILLS", 100))
DAMAGED = int(os.environ.get("CTXKV_DAMAGED", 300))
FULL_DISKS = 20


@pytest.fixture(scope="module")
def laboratory(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield Laboratory(tmp_path_factory.mktemp("laboratory"), getattr(request, "param", "exact"))


def torture(test):
    """Mark a test as one of the long form, which runs with two recipes."""
    recipes = pytest.mark.parametrize("laboratory", ["exact", "published"], indirect=True, scope="module")
    return pytest.mark.torture(recipes(test))


@pytest.fixture
def copy(laboratory, tmp_path):
    """A finished run, to be damaged."""
    return shutil.copytree(laboratory.reference, tmp_path / "run")


@pytest.fixture(scope="module")
def begun(laboratory):
    """A run that was killed in Phase 2, its second state half written."""
    out = laboratory.root / "begun"
    laboratory.killed_at(out, laboratory.after("checkpoint/phase2.safetensors") + 3)
    assert [path.name for path in out.rglob("*.part")]
    return out


@pytest.mark.parametrize(
    ("name", "before"), [("config.json", 1), ("checkpoint/context_block.safetensors", 0), ("model", 1)]
)
def test_a_killed_run_ends_with_the_numbers_of_an_undisturbed_one(laboratory, tmp_path, name, before):
    killed = laboratory.killed_at(tmp_path / "run", laboratory.after(name) - before)
    assert killed.code == -9
    laboratory.check_run(tmp_path / "run")


def test_saved_states_do_not_take_the_room_of_the_model(laboratory):
    out = laboratory.root / "killed"  # beside the reference, so that it renames the same
    assert laboratory.killed_at(out, laboratory.after("model") - 1).code == -9
    assert (out / "checkpoint/attention.safetensors").is_file()
    assert not [*out.glob("checkpoint/phase*")]


def test_a_record_stands_only_for_the_files_it_was_made_with(laboratory, copy):
    """Made from one text, overwritten from another but not recorded, then the first text again."""
    write_conversations(laboratory.data, 16, seed=1)
    killed = laboratory.killed_at(copy, laboratory.after("caches/val_emb.safetensors"))
    write_conversations(laboratory.data, 16)
    assert killed.code == -9
    laboratory.check_run(copy)


def test_a_finished_result_of_other_text_is_made_again_which_a_line_says(laboratory, copy):
    write_conversations(laboratory.data, 16, seed=1)
    again = laboratory.run(copy)
    write_conversations(laboratory.data, 16)
    assert again.code == 0
    assert "phase1 is made again: the finished result is of other text, code or precision." in again.text


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("caches/train_emb.safetensors", flip, "train_emb.safetensors is damaged: caches is made again"),
        ("caches/val_ctx.safetensors", delete, "val_ctx.safetensors is missing: caches is made again"),
        ("checkpoint/context_block.safetensors", cut, "context_block.safetensors is damaged: phase1 is made"),
        ("checkpoint/attention.safetensors", swap, "attention.safetensors is damaged: phase2 is made again"),
        (STAGES, cut, "stages.json cannot be used: it is not JSON; every stage is made again"),
        ("config.json", cut, "config.json is damaged: results are written anew"),
        ("summary.json", cut, "summary.json is damaged: results are written anew"),
        ("metrics.jsonl", cut, "metrics.jsonl is damaged: results are written anew"),
        ("report.md", flip, "report.md is damaged: results are written anew"),
        ("model/README.md", delete, "README.md is missing: results are written anew"),
    ],
)
def test_damage_is_repaired_with_the_same_numbers(laboratory, copy, name, damage, said):
    damage(copy / name, random.Random(1), copy / "checkpoint/context_block.safetensors")
    read = in_child(lambda: main(["report", str(copy)]))
    if name in ("config.json", "summary.json", "metrics.jsonl"):
        assert f"{name} is damaged; make it again with `ctxkv run" in read.text
    elif name == STAGES:
        assert "stages.json cannot be used: it is not JSON; run what made it again." in read.text
    else:
        assert read == laboratory.report
    assert read.is_a_sentence or read.code == 0
    assert said in laboratory.check_run(copy).text


@pytest.mark.parametrize(
    "name", ["caches/train_ctx.safetensors", "checkpoint/phase2.previous.safetensors", STAGES]
)
def test_damage_of_an_unfinished_run_is_repaired(laboratory, begun, tmp_path, name):
    out = shutil.copytree(begun, tmp_path / "run")
    os.truncate(out / name, 50)
    laboratory.check_run(out)


def test_a_lost_model_is_put_together_again_without_training(laboratory, copy, monkeypatch):
    shutil.rmtree(copy / "model")
    monkeypatch.setattr(stages, "train_attention", None)
    monkeypatch.setattr(contexts, "_train_block", None)
    laboratory.check_run(copy)


def test_a_second_process_is_refused(laboratory, copy):
    with only_process(copy):
        refused = laboratory.run(copy)
    assert refused.is_a_sentence
    assert f"in use by process {os.getpid()}" in refused.text


def test_what_systems_and_killed_first_writes_leave_is_no_run(laboratory, tmp_path):
    for name in (".config.json.77.part", ".DS_Store", "desktop.ini", "Thumbs.db"):
        (tmp_path / name).write_text("")
    assert laboratory.run(tmp_path).code == 0
    assert not (tmp_path / ".config.json.77.part").exists()


def test_a_finished_result_without_its_record_is_kept(laboratory, copy):
    (copy / STAGES).unlink()
    refused = laboratory.run(copy)
    assert refused.is_a_sentence
    assert "holds a finished result without its record, which is kept" in refused.text
    command = refused.text.split("`")[1]
    assert command.endswith("--again")
    assert main(shlex.split(command)[1:]) == 0
    assert outcome(copy) == laboratory.expected


def test_settings_of_another_version_are_refused_in_a_sentence(laboratory, copy):
    config = json.loads((copy / "config.json").read_text())
    for name, value in {"phase2": {"momentum": 1}, "probes": {"horizon": 3}}.items():
        records = read_sealed_json(copy / STAGES)
        records["config"] = {**config, name: value}
        write_sealed_json(copy / STAGES, records)
        with pytest.raises(UserError, match=r"another version of ctxkv_lib \(setting is .*use that version"):
            RunFolder(copy).records_of(config_from_dict(config))
    write_sealed_json(copy / STAGES, {"config": config, "stages": {"phase1": {"digest": "0"}}})
    with pytest.raises(DamagedFile, match="another version of ctxkv_lib wrote it"):
        Records.read(copy)


def test_another_precision_is_said_and_made_anew(laboratory, begun, tmp_path, monkeypatch):
    out = shutil.copytree(begun, tmp_path / "run")
    here = laboratory.expected["summary"]["provenance"]["precision"]
    other = next(name for name in PRECISIONS if name != here)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(work, "choose_precision", lambda *_: other)
        done = laboratory.run(out)
        assert done.code == 0
        assert f"runtime.precision=auto was {here} where the run began and is {other} here" in done.text
        made = json.loads((out / "summary.json").read_text())["provenance"]
        assert made["precision"] == other
        assert "again" not in laboratory.run(out).text  # finished: there is nothing left to decide
    kept = laboratory.run(out)
    assert f"The finished result is in {other} and is kept" in kept.text
    assert json.loads((out / "summary.json").read_text())["provenance"] == made


@torture
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
            killed = laboratory.killed_at(out, draw.randrange(2 * len(laboratory.renames)))
        ended[killed.code] += 1
        write_conversations(laboratory.data, 16)
        laboratory.check_run(out)
        shutil.rmtree(out)
    print(f"\nkilled: {ended}")


@torture
def test_damaged_files_are_repaired_refused_or_harmless(laboratory, tmp_path):
    draw, ended = random.Random(2), Counter()
    other = Laboratory(tmp_path, "exact", **{"runtime.seed": 7})
    begun = tmp_path / "begun"
    laboratory.killed_at(begun, laboratory.after("checkpoint/phase2.safetensors") + 4)
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


@torture
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


@torture
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


@torture
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
