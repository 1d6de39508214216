"""The record of a run is true: a stage counts only with its key and its files, whatever happened to them."""

import json
import os
import shutil

import pytest
from conftest import cut

from ctxkv_lib.errors import UserError
from ctxkv_lib.files import digest, write_json, write_text
from ctxkv_lib.runs.folder import RECORD, RunFolder, claimed
from ctxkv_lib.runs.names import run_folder_of
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.runs.summary import load_run

CONFIG = build_config("ci", samples=3)
ORIGIN = {"code": "c", "data": "d", "precision": "fp32"}


def finish(folder, name, text="numbers", key="key"):
    path = folder.path / "checkpoint" / f"{name}.txt"
    write_text(path, text)
    return folder.finish(name, key, [path], {"text": text})


def write_record(path, values):
    """Write a record as it is, with its checksum."""
    values.pop("checksum", None)
    write_json(path / RECORD, {"checksum": digest(values), **values})


def begun(path, *stages, config=CONFIG, origin=ORIGIN, **options):
    """The record of a run with these stages finished."""
    with claimed(path, config, origin, **options) as folder:
        for stage in stages:
            finish(folder, stage)
    return folder


@pytest.fixture
def run(tmp_path):
    begun(tmp_path / "run", "phase1", "test", "results")
    return tmp_path / "run"


def test_a_new_stage_drops_the_results_and_a_measurement_does_not(run):
    with claimed(run, CONFIG, ORIGIN) as folder:
        finish(folder, "ngrams")
        assert "results" in RunFolder.read(run).stages
        finish(folder, "phase1")
    assert "results" not in RunFolder.read(run).stages


def test_a_result_in_another_precision_is_replaced_only_if_asked(tmp_path):
    run, other = tmp_path / "run", {**ORIGIN, "precision": "other"}
    config = CONFIG.replace({"runtime.precision": "fp32"})
    begun(run, "results", config=config)
    before = (run / RECORD).read_bytes()
    with pytest.raises(UserError, match=r"finished result of other precision; .*--again"):
        begun(run, config=config, origin=other)
    assert (run / RECORD).read_bytes() == before
    assert "results" not in begun(run, config=config, origin=other, again=True).stages


def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(run):
    with claimed(run, CONFIG, {**ORIGIN, "precision": "bf16"}) as folder:
        assert folder.origin["precision"] == "fp32"
        assert "results" in folder.stages


def test_folders_of_other_things_are_refused_and_left(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and has no record of a run"):
        begun(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir() if path.name != ".lock"] == ["thesis.tex"]
    (tmp_path / "opened").mkdir()  # by a file manager
    for name in (".DS_Store", ".config.json.77.part"):
        (tmp_path / "opened" / name).touch()
    begun(tmp_path / "opened")
    assert not (tmp_path / "opened" / ".config.json.77.part").exists()
    with pytest.raises(UserError, match="is a file"):
        begun(tmp_path / "full" / "thesis.tex")
    with pytest.raises(UserError, match="holds runs and is none; name one of them"):
        load_run(tmp_path)


def test_a_damaged_record_is_refused_and_replaced_only_if_asked(run, damage):
    damage(run / RECORD)
    for read in (lambda: load_run(run), lambda: begun(run)):
        with pytest.raises(UserError, match=r"stages\.json"):
            read()
    assert begun(run, again=True).stages == {}


def test_a_setting_that_is_new_has_its_default_and_one_that_is_not_known_is_of_another_version(run):
    record = json.loads((run / RECORD).read_text())
    del record["config"]["phase2"]["patience"]
    write_record(run, record)
    assert "results" in begun(run).stages
    record["config"]["phase2"]["momentum"] = 1
    write_record(run, record)
    with pytest.raises(UserError, match="another version of ctxkv_lib; use that version, or another folder"):
        RunFolder.read(run)
    del record["config"]["phase2"]["momentum"], record["format"]
    write_record(run, record)
    with pytest.raises(UserError, match="another version of ctxkv_lib"):
        load_run(run)


def test_a_reader_refuses_what_is_unfinished(tmp_path):
    begun(tmp_path / "begun", "phase1")
    with pytest.raises(UserError, match="has not finished; go on with `ctxkv run --out"):
        load_run(tmp_path / "begun")


@pytest.mark.parametrize("can_link", [True, False])
def test_a_stage_of_a_run_beside_is_linked_if_it_is_intact(run, tmp_path, monkeypatch, capsys, can_link):
    if not can_link:
        monkeypatch.setattr(os, "link", lambda *_: os.stat("/nowhere"))
    broken = shutil.copytree(run, tmp_path / "a broken one")
    cut(broken / "checkpoint" / "phase1.txt")
    (tmp_path / "a damaged one" / "checkpoint").mkdir(parents=True)
    (tmp_path / "a damaged one" / RECORD).write_text("{")
    (run / "checkpoint/phase1.txt").chmod(0o444)
    with claimed(tmp_path / "new", CONFIG.replace({"phase2.patience": 7}), ORIGIN) as folder:
        assert folder.link("phase1", "key").result == {"text": "numbers"}
        assert folder.link("phase1", "another") is None
    assert "phase1: taken from run, same settings, data and code." in capsys.readouterr().err
    taken = tmp_path / "new" / "checkpoint" / "phase1.txt"
    assert taken.samefile(run / "checkpoint/phase1.txt") == can_link
    assert (run / "checkpoint/phase1.txt").stat().st_mode & 0o777 == 0o444  # as it was


def test_only_one_at_a_time_works_in_a_folder(run):
    with claimed(run, CONFIG, ORIGIN), pytest.raises(UserError, match="is in use by another process; wait"):
        begun(run)
    begun(run)


def test_a_folder_in_which_nothing_was_made_goes(tmp_path):
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "new", CONFIG, ORIGIN):
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()


def test_the_name_of_a_folder_says_what_was_changed(tmp_path, monkeypatch):
    name = run_folder_of(CONFIG).name
    assert name == "ci-exact-3"
    monkeypatch.setenv("CTXKV_RUNS", str(tmp_path / "runs"))  # is read at the call
    assert run_folder_of(CONFIG) == tmp_path / "runs" / name
    changed = run_folder_of(CONFIG.replace({"phase2.patience": 7})).name
    assert changed.startswith("ci-exact-3-")
    assert changed == run_folder_of(CONFIG.replace({"phase2.patience": "7"})).name


def test_the_text_counts_and_not_where_it_lies(tmp_path):
    configs = []
    for file in ("a.jsonl", "b.jsonl"):
        (tmp_path / file).write_text(2 * (json.dumps({"text": "rain"}) + "\n"))
        configs.append(CONFIG.replace({"data.source": "file", "data.path": str(tmp_path / file)}))
    here, moved = configs
    assert run_folder_of(here).name == run_folder_of(moved).name
    begun(tmp_path / "run", "results", config=here)
    (tmp_path / "a.jsonl").unlink()
    assert "results" in begun(tmp_path / "run", config=moved).stages
