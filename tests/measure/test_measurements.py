"""Measurements of a finished run are computed once, on request, and apply only to the run's weights."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.measure import measurements as module
from ctxkv_lib.measure.measurements import measure
from ctxkv_lib.runs.summary import load_run


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
    monkeypatch.setattr(module.ngrams, "ngrams_of_run", None)
    assert measure(found).summary == found.summary
    assert run(found.config, found.path).summary == found.summary


def test_a_measurement_belongs_to_the_texts_that_it_was_made_from(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(module.ngrams, "ngrams_of_run", lambda _: {"kneser_ney": {"val_ppl": 3.0}})
    measure(run(tiny_config, tmp_path / "run"))
    assert load_run(tmp_path / "run").summary["ngrams"] == {"kneser_ney": {"val_ppl": 3.0}}
    swap(Path(tiny_config.data.path), 10)  # the first conversation of the test
    assert "ngrams" not in run(tiny_config, tmp_path / "run").summary


def test_an_interrupted_measurement_leaves_the_results_as_they_were(copy, monkeypatch):
    monkeypatch.setattr(module.ngrams, "ngrams_of_run", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measure(copy)
    assert load_run(copy.path).summary == copy.summary
    monkeypatch.setattr(module.ngrams, "ngrams_of_run", lambda _: {"kneser_ney": {"val_ppl": 3.0}})
    assert measure(copy).summary["ngrams"]


def swap(path, first):
    """Exchange two conversations of a file."""
    lines = path.read_text().splitlines()
    lines[first], lines[first + 1] = lines[first + 1], lines[first]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(("split", "first"), [("test", 8), ("corpus", 10)])
def test_a_run_is_refused_if_its_conversations_have_changed(tiny_config, tmp_path, split, first):
    config = tiny_config.replace({"data.unigram": "corpus", "data.corpus": "own"})
    made = run(config, tmp_path / "run")
    swap(Path(tiny_config.data.path), first)
    with pytest.raises(UserError, match=rf"for {split} are not those that .* made from; restore them, or"):
        measure(made)
