"""Measurements of a finished run: made when asked for, once, and kept with the run's present weights."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import PreviousToken

import ctxkv_lib
from ctxkv_lib import experiments
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import prepare, run, write_results
from ctxkv_lib.measure import measurements as module
from ctxkv_lib.measure.measurements import measure
from ctxkv_lib.runs.folder import RESULTS, RunFolder
from ctxkv_lib.runs.keys import MEASUREMENTS
from ctxkv_lib.runs.opened import open_run
from ctxkv_lib.runs.summary import load_run, measurements


@pytest.fixture
def copy(finished_run, tmp_path):
    return load_run(shutil.copytree(finished_run.path, tmp_path / "run"))


@pytest.mark.slow
def test_they_are_made_once_and_kept_in_summary_report_and_folder(copy, monkeypatch):
    found = measure(copy)
    assert load_run(copy.path).summary == found.summary
    assert {*found.summary} - {*copy.summary} == {*MEASUREMENTS}
    baseline = found.summary["ngrams"]["kneser_ney"]
    tokens = [count for count, _ in copy.summary["test"]["conversations"]]  # of the model's losses
    loss = np.average(baseline["test_conversations"], weights=tokens)
    assert loss == pytest.approx(np.log(baseline["test_ppl"]))
    assert found.summary["probe"]["changed"]["elsewhere"]["ppl"] > 1
    assert "n-grams" in (copy.path / "report.md").read_text()
    monkeypatch.setattr(module, "MEASURES", {})
    assert measure(found).summary == found.summary
    assert ctxkv_lib.probe(found) == found.summary["probe"]
    assert run(found.config, found.path).summary == found.summary


def test_a_measurement_belongs_to_the_weights_that_it_was_made_of(copy, monkeypatch):
    monkeypatch.setattr(module, "MEASURES", {"ngrams": lambda _: {"kneser_ney": {"val_ppl": 3.0}}})
    measure(copy, ["ngrams"])
    folder = RunFolder.read(copy.path)
    assert measurements(folder) == {"ngrams": {"kneser_ney": {"val_ppl": 3.0}}}
    folder.finish("test", "of other weights")
    assert not measurements(folder)


def test_a_measurement_that_stops_keeps_the_results(copy, monkeypatch):
    monkeypatch.setattr(module, "MEASURES", {"ngrams": Mock(side_effect=KeyboardInterrupt)})
    with pytest.raises(KeyboardInterrupt):
        measure(copy, ["ngrams"])
    assert load_run(copy.path).summary == copy.summary
    monkeypatch.setattr(module, "MEASURES", {"ngrams": lambda _: {"kneser_ney": {"val_ppl": 3.0}}})
    with monkeypatch.context() as stopped:
        stopped.setattr(module, "write_results", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            measure(copy, ["ngrams"])
    assert measure(copy, ["ngrams"]).summary["ngrams"]


def test_results_that_are_half_written_are_not_recorded(copy, monkeypatch):
    monkeypatch.setattr(experiments, "write_json", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_results(RunFolder.read(copy.path))
    assert RESULTS not in RunFolder.read(copy.path).stages


def test_contexts_are_probed_before_attention_is_trained(tiny_config, tmp_path):
    measured = ctxkv_lib.probe(prepare(tiny_config, tmp_path / "run"))
    assert measured["decodability"][0]["distance"] == 0
    assert "changed" not in measured
    with pytest.raises(UserError, match="reads tokens, so there are no contexts to probe"):
        ctxkv_lib.probe(prepare(tiny_config, tmp_path / "tokens", layer=PreviousToken))


@pytest.mark.parametrize(
    ("split", "first", "parts", "use"),
    [
        ("test", 8, {}, measure),
        ("corpus", 10, {}, measure),
        ("corpus", 10, {"layer": PreviousToken}, open_run),
    ],
)
def test_a_run_is_not_used_with_other_conversations(tiny_config, tmp_path, split, first, parts, use):
    made = run(tiny_config.replace({"data.unigram": "corpus"}), tmp_path / "run", **parts)
    path = Path(tiny_config.data.path)
    lines = path.read_text().splitlines()
    lines[first], lines[first + 1] = lines[first + 1], lines[first]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"for {split} are not those that .* made from; restore them, or"):
        use(made)
