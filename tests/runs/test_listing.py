"""Runs are found in folders, listed in their state, and named by what differs between them."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import stop_at
from sample_runs import write_run

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.runs.differences import run_folders, run_names
from ctxkv_lib.runs.listing import list_runs
from ctxkv_lib.runs.records import Records
from ctxkv_lib.runs.run_folder import load_run

BREAKS = {
    "summary": lambda run: (run / "summary.json").write_text('{"phase2"'),
    "model": lambda run: shutil.rmtree(run / "model"),
    "no record": lambda run: (run / "checkpoint" / "stages.json").unlink(),
    "no config": lambda run: (run / "config.json").unlink(),
    "metrics": lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"),
    "no objects": lambda run: (run / "metrics.jsonl").write_bytes(b"[]\n"),
    "no metrics": lambda run: (run / "metrics.jsonl").write_bytes(b""),
    "nested metrics": lambda run: (run / "metrics.jsonl").write_bytes(b"[" * 100_000 + b"\n"),
    "config": lambda run: (run / "config.json").write_text("[]"),
}


@pytest.fixture(scope="module")
def root(finished_run, tmp_path_factory):
    """A finished run, an interrupted one, and broken copies of the first."""
    root = tmp_path_factory.mktemp("listed")
    shutil.copytree(finished_run.path, root / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(finished_run.config.replace({"data.samples": 4}), root / "inside" / "stopped", stop_at("phase2"))
    for name, break_it in BREAKS.items():
        break_it(shutil.copytree(root / "whole", root / name))
    (root / "empty").mkdir()
    return root


def test_every_run_is_listed_in_its_state_in_a_line(root, printed_by):
    listed = {found.path.name: found for found in list_runs(root)}
    states = {name: found.state for name, found in listed.items()}
    assert states == {"whole": "finished", "stopped": "interrupted", **dict.fromkeys(BREAKS, "damaged")}
    summary = json.loads((root / "whole" / "summary.json").read_text())
    whole, stopped = listed["whole"], listed["stopped"]
    assert (whole.tokens, whole.best_ppl) == (summary["train_tokens"], summary["phase2"]["val_ppl"])
    assert listed["no record"].best_ppl == whole.best_ppl
    assert whole.settings["model.interval"] == 3
    assert "phase2.patience" not in whole.settings
    assert stopped.best_ppl > 0
    assert whole.mib > stopped.mib > 0
    first, *lines = printed_by("list", root).splitlines()
    assert first.split()[:2] == ["Run", "State"]
    assert len(lines) == 2 + len(BREAKS)
    (stopped,) = [line for line in lines if "stopped" in line]
    assert "interrupted" in stopped
    assert "model.interval=3" in stopped
    (whole,) = [line for line in lines if "/whole " in line]
    assert whole.split()[1:4] == ["finished", "ci,", "exact"]
    assert "data.path=" in whole
    assert "data.source" not in whole
    assert len(printed_by("list", root, "--json")) == len(lines)
    shown = repr(load_run(root / "whole"))
    assert shown.startswith(f"Run('{root / 'whole'}': 8 samples, val PPL ")
    assert len(shown) < 200


def test_the_refusal_of_a_folder_names_the_run_to_take(root, tmp_path):
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "comparison.json").write_text("{}")
    for place, said in (
        (root / "whole" / "model", f"is a run's model; name the run, {root / 'whole'}."),
        (root, f"holds runs and is none; name one of them (`ctxkv list {root}` shows them)."),
        (tmp_path / "both", f"is a comparison; name one of its runs (`ctxkv list {tmp_path}` shows them)."),
        (root / "empty", "has no config.json; make a run there"),
    ):
        with pytest.raises(UserError, match=re.escape(f"{place} {said}")):
            load_run(place)


def test_sizes_of_validation_and_test_are_listed_unless_a_file_has_them(tmp_path, finished_run):
    write_run(tmp_path / "run", settings={"data.validation_samples": 30})
    shutil.copytree(finished_run.path, tmp_path / "own")
    own, other = list_runs(tmp_path)
    assert other.settings == {"data.validation_samples": 30}
    assert "data.validation_samples" not in own.settings


def test_a_folder_that_cannot_be_read_leaves_the_others_listed(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    (tmp_path / "lost+found").mkdir()
    is_there = Path.exists

    def exists(path, **options):
        if "lost+found" in path.parts:
            raise PermissionError(path)
        return is_there(path, **options)

    monkeypatch.setattr(Path, "exists", exists)
    assert [found.path.name for found in list_runs(tmp_path)] == ["run"]


def test_a_run_whose_weights_were_dropped_has_results_only(finished_run, tmp_path):
    copy = shutil.copytree(finished_run.path, tmp_path / "run")
    records = Records.read(copy)
    records.stages["model"] = replace(records.stages["model"], files={})  # a mixer's is not exported
    records.drop(["caches", "checkpoint/attention.safetensors"])
    (found,) = list_runs(copy)
    assert found.state == "results only"


def named(tmp_path, *settings):
    folders = [
        write_run(tmp_path / f"run{i}", each.pop("samples", 100), settings=each)
        for i, each in enumerate(settings)
    ]
    return run_names([load_run(folder) for folder in folders])


def test_runs_are_named_by_what_differs(tmp_path):
    assert named(tmp_path / "a", {"samples": 100}, {"samples": 1000}) == ["100 samples", "1,000 samples"]
    seeds = named(tmp_path / "b", {"runtime.seed": 1}, {"runtime.seed": 2, "model.interval": 50})
    assert seeds == ["interval 20, seed 1", "interval 50, seed 2"]
    rates = named(tmp_path / "e", {}, {"phase1.learning_rate": 2.0, "phase2.learning_rate": 3.0})
    assert rates[1] == "phase1.learning_rate 2.0, phase2.learning_rate 3.0"
    assert named(tmp_path / "c", {}) == ["100 samples"]
    assert named(tmp_path / "d", {}, {}) == ["run0", "run1"]  # their folders


def test_a_folder_of_runs_stands_for_the_finished_ones_in_it(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path / name)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "a-vs-b" / "figures").mkdir(parents=True)
    assert run_folders(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert run_folders([tmp_path / "b", str(tmp_path)]) == [tmp_path / "b", tmp_path / "a"]
