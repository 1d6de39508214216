"""Measurements of a finished run are computed once, on request, and apply only to the run's weights."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import PreviousToken

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.measure import measurements as module
from ctxkv_lib.measure.measurements import measure
from ctxkv_lib.runs.folder import RunFolder
from ctxkv_lib.runs.opened import open_run
from ctxkv_lib.runs.records import Record
from ctxkv_lib.runs.summary import load_run, summarize


@pytest.fixture
def copy(finished_run, tmp_path):
    return load_run(shutil.copytree(finished_run.path, tmp_path / "run"))


@pytest.mark.slow
def test_measurements_are_made_once_and_kept_in_summary_report_and_folder(copy, monkeypatch):
    found = measure(copy)
    assert load_run(copy.path).summary == found.summary
    assert {*found.summary} - {*copy.summary} == {"ngrams"}
    baseline = found.summary["ngrams"]["kneser_ney"]
    tokens = [count for count, _ in copy.summary["test"]["conversations"]]  # per conversation
    loss = np.average(baseline["test_conversations"], weights=tokens)
    assert loss == pytest.approx(np.log(baseline["test_ppl"]))
    assert "n-grams" in (copy.path / "report.md").read_text()
    monkeypatch.setattr(module.ngrams, "of_run", None)
    assert measure(found).summary == found.summary
    assert run(found.config, found.path).summary == found.summary


def test_a_measurement_belongs_to_the_weights_that_it_was_made_with(copy, monkeypatch):
    monkeypatch.setattr(module.ngrams, "of_run", lambda _: {"kneser_ney": {"val_ppl": 3.0}})
    measure(copy)
    folder = RunFolder.read(copy.path)
    assert summarize(folder)["ngrams"] == {"kneser_ney": {"val_ppl": 3.0}}
    folder.write("test", Record({"code": "different weights"}))
    assert "ngrams" not in summarize(folder)


def test_an_interrupted_measurement_leaves_the_results_as_they_were(copy, monkeypatch):
    monkeypatch.setattr(module.ngrams, "of_run", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measure(copy)
    assert load_run(copy.path).summary == copy.summary
    monkeypatch.setattr(module.ngrams, "of_run", lambda _: {"kneser_ney": {"val_ppl": 3.0}})
    assert measure(copy).summary["ngrams"]


@pytest.mark.parametrize(
    ("split", "first", "parts", "use"),
    [
        ("test", 8, {}, measure),
        ("corpus", 10, {}, measure),
        ("corpus", 10, {"layer": PreviousToken}, open_run),
    ],
)
def test_a_run_is_refused_if_its_conversations_have_changed(tiny_config, tmp_path, split, first, parts, use):
    made = run(tiny_config.replace({"data.unigram": "corpus"}), tmp_path / "run", **parts)
    path = Path(tiny_config.data.path)
    lines = path.read_text().splitlines()
    lines[first], lines[first + 1] = lines[first + 1], lines[first]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"for {split} are not those that .* made from; restore them, or"):
        use(made)
