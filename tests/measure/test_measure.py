"""Measurements of a finished run: made when asked for, once, and kept with the run."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ctxkv_lib.runs.records import MEASUREMENTS
from ctxkv_lib.runs.run_folder import RunFolder, load_run
from ctxkv_lib.runs.testing import measurements

import ctxkv_lib
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run, write_results
from ctxkv_lib.measure import measure as module
from ctxkv_lib.measure import ngrams
from ctxkv_lib.measure.measure import measure
from ctxkv_lib.report.document import write_report
from ctxkv_lib.runs import package_code


def test_they_are_kept_in_summary_report_and_folder(finished_run, measured):
    assert not set(MEASUREMENTS) & set(finished_run.summary)
    assert [name for name in MEASUREMENTS if name in measured.summary] == [*MEASUREMENTS]
    assert load_run(measured.path).summary == measured.summary
    report = (measured.path / "report.md").read_text()
    assert (measured.path / "figures" / "probe.png").is_file()
    assert "probe.png" in report
    assert "of another conversation" in report
    assert write_report([measured], "ja").count("| ") == report.count("| ")
    assert measured.summary["ngrams"]["kneser_ney"]["test_ppl"] > 1
    assert ctxkv_lib.probe(measured) == measured.summary["probe"]


def test_each_is_made_once_and_anew_when_its_code_changes(measured, tmp_path, monkeypatch):
    measured = load_run(shutil.copytree(measured.path, tmp_path / "run"))
    monkeypatch.setattr(module, "MAKERS", {})
    assert measure(measured).summary == measure(measured, []).summary == measured.summary
    assert run(measured.config, measured.path).summary == measured.summary
    made = {"kneser_ney": {"val_ppl": 3.0, "order": 2}}
    monkeypatch.setattr(module, "MAKERS", {"ngrams": lambda *_: made})
    with monkeypatch.context() as patch:
        patch.setattr(module, "code_with_imports", lambda name: f"new code of {name}")
        again = measure(measured, ["ngrams"]).summary
    assert again == {**measured.summary, "ngrams": made}
    monkeypatch.undo()
    assert measure(measured).summary == measured.summary
    folder = RunFolder(measured.path)
    with folder.claimed(measured.config):
        stages = folder.records.stages
        stages["test"] = replace(stages["test"], key="of other weights")
        assert not measurements(folder)


def test_a_measurement_that_stops_keeps_the_run_finished_and_what_was_measured(
    finished_run, measured, tmp_path, monkeypatch, interrupts
):
    found = load_run(shutil.copytree(finished_run.path, tmp_path / "run"))

    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "MAKERS", {**module.MAKERS, "probe": stops})
    with pytest.raises(KeyboardInterrupt):
        measure(found, ["ngrams", "probe"])
    assert load_run(found.path).summary == finished_run.summary
    monkeypatch.setattr(module, "MAKERS", {})
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_results", stops)
        with pytest.raises(KeyboardInterrupt):
            measure(found, ["ngrams"])
    with pytest.raises(UserError, match="has not finished"):
        load_run(found.path)

    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        return write_results(*given)

    monkeypatch.setattr(module, "write_results", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(found, ["ngrams"])  # stops when all is written
    assert load_run(found.path).summary == {**finished_run.summary, "ngrams": measured.summary["ngrams"]}


def test_its_code_is_its_module_and_what_that_imports(tmp_path, monkeypatch):
    files = {
        "measure/one": "from ..runs.four import d\nfrom .two import b\nimport torch\n",
        "measure/two": "from ..data.three import c\n",
        "data/three": "c = 1\n",
        "runs/four": "d = 1\n",
        "measure/five": "e = 1\n",
    }
    monkeypatch.setattr(package_code, "PACKAGE", tmp_path)
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(code)
    before = package_code.code_with_imports("measure/one")
    for name, code in files.items():
        for more, is_other in (("# a comment", False), ("f = 2", name not in ("runs/four", "measure/five"))):
            (tmp_path / f"{name}.py").write_text(code + more)
            assert (package_code.code_with_imports("measure/one") != before) == is_other
        (tmp_path / f"{name}.py").write_text(code)


def test_an_unknown_measurement_is_refused(finished_run):
    with pytest.raises(UserError, match="measurement is 'horizon'; allowed: ngrams, probe"):
        measure(finished_run, ["horizon"])


def test_a_run_that_has_gone_is_refused_and_its_folder_not_made(finished_run, tmp_path):
    gone = tmp_path / "runs" / "gone"
    with pytest.raises(UserError, match="gone is not a folder; name one of `ctxkv list`, or make"):
        measure(replace(finished_run, path=gone))
    assert not gone.parent.exists()


def test_measurements_of_a_file_that_has_changed_are_refused(tiny_config, tmp_path):
    finished, data = run(tiny_config, tmp_path / "run"), Path(tiny_config.data.path)
    text = data.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    lines[8] = lines[8].replace('"content": "', '"content": "another ', 1)  # of the test
    data.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"The test conversations in .* are not those that .*run was"):
        measure(finished, ["ngrams"])
    data.write_text(text, encoding="utf-8")
    assert "ngrams" in measure(finished, ["ngrams"]).summary


KINDS = ("kneser_ney", "kneser_ney_cache")


@pytest.mark.parametrize("own", [False, True])
def test_n_grams_count_what_the_table_is_made_from_once(tiny_config, tmp_path, monkeypatch, own):
    """The training text of one's own file is in its table already."""
    streams = {"train": torch.tensor([1, 2]), "val": torch.tensor([3, 4])}
    monkeypatch.setattr(ngrams, "load_ids", lambda _, split: streams[split])
    monkeypatch.setattr(ngrams, "test_stream", lambda _: None)
    monkeypatch.setattr(ngrams, "corpus_counts", lambda *_: None)
    monkeypatch.setattr(ngrams, "corpus_ids", lambda _: torch.tensor([5, 1, 2]))
    monkeypatch.setattr(ngrams, "ngram_baselines", lambda train, *_: dict.fromkeys(KINDS, train.tolist()))
    data = {"data.table": "cooccurrence"}
    if own:
        data |= {"data.source": "file", "data.path": "chats.jsonl", "data.corpus": "chitchat+own"}
    config, folder = tiny_config.replace(data), RunFolder(tmp_path)
    counted = [5, 1, 2] if own else [5, 1, 2, 1, 2]
    alone = {kind: [1, 2] for kind in KINDS}
    assert ngrams.of_run(config, folder, None) == {**alone, "kneser_ney_table_cache": counted}
    said: list[str] = []
    monkeypatch.setattr(ngrams, "say", said.append)
    most = len(counted) - 1
    monkeypatch.setattr(ngrams, "MOST_COUNTED", most)
    assert ngrams.of_run(config, folder, None) == alone
    assert said == [f"No n-grams of {most + 1} tokens, which are more than {most}."]
