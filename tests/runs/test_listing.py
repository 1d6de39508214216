"""Runs are found in folders, listed in their state, and named by what differs between them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from sample_runs import sample_run, write_run

from ctxkv_lib.errors import UserError
from ctxkv_lib.report.tables import format_runs
from ctxkv_lib.runs.folder import RECORD, RunFolder
from ctxkv_lib.runs.listing import list_runs
from ctxkv_lib.runs.names import run_names


def test_every_run_is_listed_in_its_state(tmp_path):
    write_run(tmp_path / "a", 100)
    write_run(tmp_path / "both" / "b", 500, settings={"phase2.patience": 7})
    stopped = RunFolder.read(write_run(tmp_path / "c", 100))
    del stopped.stages["results"]
    stopped.write()
    (write_run(tmp_path / "d", 100) / "summary.json").unlink()
    (write_run(tmp_path / "e", 100) / RECORD).write_text("{")
    (tmp_path / "no run").mkdir()
    found = list_runs(tmp_path)
    assert [(run.path.name, run.state) for run in found] == [
        ("a", "finished"),
        ("b", "finished"),
        ("c", "interrupted"),
        ("d", "damaged"),
        ("e", "damaged"),
    ]
    assert (found[0].best_ppl, found[0].tokens, found[0].kind) == (366.4, 122_795, "colab, published")
    assert found[1].settings == {"phase2.patience": 7}
    assert found[4].kind == "-"
    lines = format_runs(found).splitlines()
    assert len(lines) == 6
    assert re.search(r"colab, published +122,795 +366\.4", lines[1])
    with pytest.raises(UserError, match="is not a folder; name the one that holds your run folders"):
        list_runs(tmp_path / "nowhere")


def test_runs_are_named_by_the_few_settings_that_differ_or_by_their_folders():
    few, many = sample_run(100, path=Path("runs/few")), sample_run(500, path=Path("runs/many"))
    assert run_names([few, many]) == ["100 samples", "500 samples"]
    assert run_names([many]) == ["500 samples"]
    other = sample_run(100, settings={"model.interval": 10}, path=Path("runs/other"))
    assert run_names([few, other]) == ["interval 20", "interval 10"]
    own = sample_run(100, settings={"attention": "conftest:NearestTwo"}, path=Path("runs/own"))
    assert run_names([few, own])[1].endswith("attention NearestTwo")
    assert run_names([few, replace(few, path=Path("runs/again"))]) == ["few", "again"]
    assert run_names([few, replace(few, path=Path("b/few"))]) == ["runs/few", "b/few"]
