"""Runs are found in folders, and listed with their state and results."""

import re
from pathlib import Path

import pytest
from conftest import PreviousToken, lines_of
from sample_runs import write_run
from torch import nn

from ctxkv_lib.errors import Interrupted, UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.files import replacing
from ctxkv_lib.method.block import ContextBlock
from ctxkv_lib.report.document import write_report
from ctxkv_lib.report.tables import format_results
from ctxkv_lib.runs.listing import describe_store, results
from ctxkv_lib.runs.summary import load_run


def test_every_run_is_listed_in_its_state(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXKV_RUNS", str(tmp_path))
    write_run(tmp_path / "a", 100)
    write_run(tmp_path / "both" / "b", 500, settings={"phase2.patience": 7})
    (write_run(tmp_path / "c", 100) / "steps/test.json").unlink()
    (write_run(tmp_path / "e", 100) / "steps/settings.json").write_text("{")
    (write_run(tmp_path / "f", 100) / "steps/settings.json").unlink()
    with (write_run(tmp_path / "g", 100) / "config.json").open("a") as file:
        file.write(" ")
    with replacing(tmp_path / "half") as beside:  # like a copy from Drive that is being restored
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
    assert f"repair it with `ctxkv run --out {tmp_path / 'f'}`" in lost.note
    lines = format_results(table).splitlines()
    assert re.search(r"a +finished +366\.4 .*  samples 100", lines[1])
    assert len([line for line in lines if "repair it" in line]) == 3  # one line per damaged run
    with pytest.raises(UserError, match="is not a folder; choose the folder that contains your run folders"):
        results(tmp_path / "nowhere")


def test_results_are_the_numbers_of_the_summaries(finished_run):
    (row,) = results([finished_run]).to_dict("records")
    summary = finished_run.summary
    for name in ("val_ppl", "val_acc", "train_ppl", "best_epoch"):
        assert row[name] == summary["phase2"][name]
    assert row["test_ppl"] == summary["test"]["ppl"]
    trained = [summary["phase1"], *summary["phase2"]["epochs"]]
    assert row["seconds"] == pytest.approx(sum(each["seconds"] for each in trained))
    assert row["phase1_parameters"] == summary["parameters"]["trainable_phase1"]
    assert row["parameters"] == summary["parameters"]["trainable_phase2"]


class ThreeBlocks(nn.Module):
    def __init__(self, context_dim, hidden_size):
        super().__init__()
        self.blocks = nn.ModuleList(ContextBlock(context_dim, hidden_size) for _ in range(3))


def test_a_block_with_three_times_the_weights_shows_them(tmp_path):
    plain = write_run(tmp_path / "plain", 100)
    runs = [
        plain,
        *(
            write_run(tmp_path / name, 100, **{kind: part})
            for name, kind, part in (("large", "block", ThreeBlocks), ("tokens", "layer", PreviousToken))
        ),
    ]
    table = results(runs)
    assert table["phase1_parameters"].tolist() == [262_912, 3 * 262_912, 0]
    assert table["parameters"].tolist() == [6_301_440, 6_301_440, 768 * 769]
    assert "788,736" in format_results(table)
    report = write_report({path.name: load_run(path) for path in runs[:2]})
    assert re.search(r"Trainable in Phase 1 \|.* 262,912 .* 788,736", report)


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


def test_the_list_fits_a_terminal_however_many_settings_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/first"), 100)
    changed = {"model.interval": 10, "phase2.learning_rate": 0.01, "phase2.patience": 7, "runtime.seed": 1}
    write_run(Path("runs/second"), 500, settings=changed)
    text = format_results(results("runs"))
    assert max(map(len, text.splitlines())) <= 120
    words = " ".join(text.partition("runs/second")[2].split())
    assert words.endswith("samples 500, interval 10, learning_rate 0.01, patience 7, seed 1")


def test_the_store_says_its_size_and_that_it_may_be_deleted(finished_run, own_store):
    assert describe_store() == ""
    (own_store / "contexts-1").mkdir(parents=True)
    (own_store / "contexts-1" / "block").write_bytes(bytes(3 << 20))
    assert describe_store() == f"The store {own_store} has 3 MiB; you may delete it at any time."
