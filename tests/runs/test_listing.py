import json
import shutil

import pytest

from ctxkv_lib.cli import main
from ctxkv_lib.config import build_config
from ctxkv_lib.experiments.experiment import run
from ctxkv_lib.runs.listing import list_runs


def break_summary(folder):
    (folder / "summary.json").write_text('{"phase2"')


def lose_model(folder):
    shutil.rmtree(folder / "model")


def lose_config(folder):
    (folder / "config.json").unlink()


def spoil_metrics(folder):
    (folder / "metrics.jsonl").write_bytes(b"\xff\n")


def spoil_config(folder):
    (folder / "config.json").write_text("[]")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run, an interrupted one, and broken copies of the first."""
    from conftest import local_experiment

    root = tmp_path_factory.mktemp("listed")
    settings = local_experiment(root)
    run(build_config("ci", samples=8, settings=settings), root / "runs" / "whole")

    def stop(metric):
        if metric["stage"] == "phase2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(build_config("ci", samples=4, settings=settings), root / "runs" / "inside" / "stopped", stop)
    for break_it in (break_summary, lose_model, lose_config, spoil_metrics, spoil_config):
        shutil.copytree(root / "runs" / "whole", root / "runs" / break_it.__name__)
        break_it(root / "runs" / break_it.__name__)
    (root / "runs" / "empty").mkdir()
    return root / "runs"


def test_every_run_is_listed_in_its_state(root):
    listed = {found.path.name: found for found in list_runs(root)}
    states = {name: found.state for name, found in listed.items()}
    broken = ("break_summary", "lose_model", "lose_config", "spoil_metrics", "spoil_config")
    assert states == {"whole": "finished", "stopped": "interrupted", **dict.fromkeys(broken, "damaged")}
    summary = json.loads((root / "whole" / "summary.json").read_text())
    whole, stopped = listed["whole"], listed["stopped"]
    assert (whole.tokens, whole.best_ppl) == (summary["train_tokens"], summary["phase2"]["val_ppl"])
    assert whole.settings["model.interval"] == 3
    assert "phase2.patience" not in whole.settings
    assert stopped.best_ppl > 0
    assert whole.mib > stopped.mib > 0


def test_the_list_is_a_line_a_run(root, capsys):
    assert main(["list", str(root)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["Run", "State"]
    assert len(lines) == 7
    (stopped,) = [line for line in lines if "stopped" in line]
    assert "interrupted" in stopped
    assert "model.interval=3" in stopped
    assert main(["list", str(root), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 7


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["list", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
