"""Runs are found in folders, listed in their state with their results, and named by what differs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import lines_of
from sample_runs import sample_run, write_run

from ctxkv_lib.errors import Interrupted, UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.files import replacing
from ctxkv_lib.report.tables import format_results
from ctxkv_lib.runs.folder import RunFolder
from ctxkv_lib.runs.listing import results
from ctxkv_lib.runs.names import run_folder_of, run_names
from ctxkv_lib.runs.presets import build_config


def test_every_run_is_listed_in_its_state(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXKV_RUNS", str(tmp_path))
    write_run(tmp_path / "a", 100)
    write_run(tmp_path / "both" / "b", 500, settings={"phase2.patience": 7})
    RunFolder.read(write_run(tmp_path / "c", 100)).drop("results")
    (write_run(tmp_path / "e", 100) / "checkpoint/settings.json").write_text("{")
    (write_run(tmp_path / "f", 100) / "checkpoint/settings.json").unlink()
    with (write_run(tmp_path / "g", 100) / "config.json").open("a") as file:
        file.write(" ")
    with replacing(tmp_path / "half") as beside:  # as a copy from Drive that is being restored
        write_run(beside, 100)
        table = results()
    assert [(Path(path).name, state) for path, state in table.state.items()] == [
        ("a", "finished"),
        ("b", "finished"),
        ("e", "damaged"),
        ("f", "damaged"),
        ("g", "damaged"),
        ("c", "interrupted"),
    ]
    first, second, lost = (table.loc[str(tmp_path / name)] for name in ("a", "both/b", "f"))
    assert (first.val_ppl, first.train_tokens, first["data.samples"]) == (366.4, 122_795, 100)
    assert (second["phase2.patience"], second.epochs) == (7, 6)
    assert f"make it again with `ctxkv run --out {tmp_path / 'f'}`" in lost.note
    lines = format_results(table).splitlines()
    assert re.search(r"a +finished +366\.4 .*  samples 100", lines[1])
    assert len([line for line in lines if "make it again" in line]) == 3  # damaged ones
    with pytest.raises(UserError, match="is not a folder; name the one that holds your run folders"):
        results(tmp_path / "nowhere")


def test_results_are_the_numbers_of_the_summaries(finished_run):
    (row,) = results([finished_run]).to_dict("records")
    summary = finished_run.summary
    for name in ("val_ppl", "val_acc", "train_ppl", "best_epoch"):
        assert row[name] == summary["phase2"][name]
    assert row["test_ppl"] == summary["test"]["ppl"]
    trained = [summary["phase1"], *summary["phase2"]["epochs"]]
    assert row["seconds"] == pytest.approx(sum(each["seconds"] for each in trained))
    assert row["parameters"] == summary["parameters"]["trainable_phase2"]


def test_an_interrupted_run_lists_its_best_epoch_so_far_and_the_number_of_its_epochs(tiny_config, tmp_path):
    def stop_where_it_gets_worse(metric):
        if not metric.get("improved", True):
            raise KeyboardInterrupt

    config = tiny_config.replace({"phase2.learning_rate": 0.3, "phase2.max_epochs": 12})
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run", stop_where_it_gets_worse)
    *_, best, last = [line for line in lines_of(tmp_path / "run") if "val_ppl" in line]
    assert best["val_ppl"] < last["val_ppl"]
    (row,) = results(tmp_path).to_dict("records")
    assert (row["state"], row["epochs"]) == ("interrupted", last["epoch"])
    assert (row["val_ppl"], row["best_epoch"]) == (best["val_ppl"], best["epoch"])


def test_a_recipe_without_one_of_its_parts_has_a_folder_of_its_own():
    tuned = build_config("ci", "tuned")
    folders = {run_folder_of(tuned.replace(part)) for part in ({}, {"block": None}, {"layer": None})}
    assert len(folders) == 3


def test_runs_are_named_by_the_few_settings_that_differ_or_by_their_folders():
    few, many = sample_run(100, path=Path("runs/few")), sample_run(500, path=Path("runs/many"))
    assert run_names([few, many]) == ["100 samples", "500 samples"]
    assert run_names([many]) == ["500 samples"]
    other = sample_run(100, settings={"model.interval": 10}, path=Path("runs/other"))
    assert run_names([few, other]) == ["interval 20", "interval 10"]
    settings = {"model.interval": 10, "model.num_heads": 4, "phase2.patience": 7, "runtime.seed": 1}
    other = sample_run(100, settings=settings, path=Path("runs/other"))
    assert run_names([few, many, other]) == ["few", "many", "other"]
    third = replace(many, config=many.config.replace({"runtime.seed": 2}))
    assert (
        run_names([few, many, other, third])[2] == "100 samples, interval 10, num_heads 4, patience 7, seed 1"
    )
    tuned = sample_run(100, recipe="tuned", settings={"runtime.seed": 1}, path=Path("runs/tuned"))
    assert run_names([few, tuned]) == ["recipe published, seed 42", "recipe tuned, seed 1"]
    assert run_names([few, replace(few, path=Path("runs/again"))]) == ["few", "again"]
    assert run_names([few, replace(few, path=Path("b/few"))]) == ["runs/few", "b/few"]


def test_the_list_fits_a_terminal_however_many_settings_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/first"), 100)
    changed = {"model.interval": 10, "phase2.learning_rate": 0.01, "phase2.patience": 7, "runtime.seed": 1}
    write_run(Path("runs/second"), 500, settings=changed)
    text = format_results(results("runs"))
    assert max(map(len, text.splitlines())) <= 120
    words = " ".join(text.partition("runs/second")[2].split())
    assert words.endswith("samples 500, interval 10, learning_rate 0.01, patience 7, seed 1")
