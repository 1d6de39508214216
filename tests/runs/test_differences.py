"""Runs are found in folders and named by what differs between them."""

from sample_runs import sample_run

from ctxkv_lib.runs.differences import run_folders, run_names
from ctxkv_lib.runs.run_folder import load_run


def named(tmp_path, *settings):
    folders = [
        sample_run(tmp_path / f"run{i}", each.pop("samples", 100), settings=each)
        for i, each in enumerate(settings)
    ]
    return run_names([load_run(folder) for folder in folders])


def test_runs_are_named_by_what_differs(tmp_path):
    assert named(tmp_path / "a", {"samples": 100}, {"samples": 1000}) == ["100 samples", "1,000 samples"]
    seeds = named(tmp_path / "b", {"runtime.seed": 1}, {"runtime.seed": 2, "model.interval": 50})
    assert seeds == ["interval 20, seed 1", "interval 50, seed 2"]
    assert named(tmp_path / "c", {}) == ["100 samples"]


def test_runs_that_settings_do_not_tell_go_by_their_folders(tmp_path):
    assert named(tmp_path, {}, {}) == ["run0", "run1"]


def test_a_folder_of_runs_stands_for_the_finished_ones_in_it(tmp_path):
    for name in ("b", "a"):
        sample_run(tmp_path / name)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "a-vs-b" / "figures").mkdir(parents=True)
    assert run_folders(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert run_folders([tmp_path / "b", str(tmp_path)]) == [tmp_path / "b", tmp_path / "a"]
