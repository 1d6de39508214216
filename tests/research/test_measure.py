"""Measurements of a finished run: made when asked for, once, and kept with the run."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run, write_results
from ctxkv_lib.report.document import write_report
from ctxkv_lib.research import measure as module
from ctxkv_lib.research import ngrams
from ctxkv_lib.research.measure import measure, measurements_of
from ctxkv_lib.runs import package_code
from ctxkv_lib.runs.records import MEASUREMENTS
from ctxkv_lib.runs.run_folder import RunFolder, load_run
from ctxkv_lib.runs.testing import measurements
from ctxkv_lib.runs.verification import verify

POSSIBLE = [*MEASUREMENTS]


def test_they_are_kept_in_summary_report_and_folder_and_the_command_probes(
    finished_run, measured, printed_by
):
    assert not set(MEASUREMENTS) & set(finished_run.summary)
    assert measurements_of(measured.config) == POSSIBLE
    assert [name for name in MEASUREMENTS if name in measured.summary] == POSSIBLE
    assert load_run(measured.path).summary == measured.summary
    assert verify(measured.path).intact
    report = (measured.path / "report.md").read_text()
    for figure in ("probe.png", "ablations.png"):
        assert (measured.path / "figures" / figure).is_file()
        assert figure in report
    assert write_report([measured], "ja").count("| ") == report.count("| ")
    assert measured.summary["ngrams"]["kneser_ney"]["test_ppl"] > 1
    expected = {name: measured.summary[name] for name in ("probe", "ablations")}
    assert printed_by("probe", measured.path, "--json") == expected
    shown = printed_by("probe", measured.path)
    assert "Memory span (tokens)" in shown
    assert "of another conversation" in shown


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

    monkeypatch.setattr(module, "MAKERS", {**module.MAKERS, "ablations": stops})
    with pytest.raises(KeyboardInterrupt):
        measure(found, ["probe", "ablations"])
    assert load_run(found.path).summary == finished_run.summary
    monkeypatch.setattr(module, "MAKERS", {})
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_results", stops)
        with pytest.raises(KeyboardInterrupt):
            measure(found, ["probe"])
    with pytest.raises(UserError, match="has not finished"):
        load_run(found.path)

    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        return write_results(*given)

    monkeypatch.setattr(module, "write_results", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(found, ["probe"])  # stops when all is written
    assert load_run(found.path).summary == {**finished_run.summary, "probe": measured.summary["probe"]}


def test_its_code_is_its_module_and_what_that_imports(tmp_path, monkeypatch):
    files = {
        "research/one": "from ..runs.four import d\nfrom .two import b\nimport torch\n",
        "research/two": "from ..data.three import c\n",
        "data/three": "c = 1\n",
        "runs/four": "d = 1\n",
        "research/five": "e = 1\n",
    }
    monkeypatch.setattr(package_code, "PACKAGE", tmp_path)
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(code)
    before = package_code.code_with_imports("research/one")
    for name, code in files.items():
        for more, is_other in (("# a comment", False), ("f = 2", name not in ("runs/four", "research/five"))):
            (tmp_path / f"{name}.py").write_text(code + more)
            assert (package_code.code_with_imports("research/one") != before) == is_other
        (tmp_path / f"{name}.py").write_text(code)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["horizon"], "measurement is 'horizon'; allowed: probe, ablations"),
    ],
)
def test_what_a_run_cannot_have_is_refused(finished_run, names, said):
    with pytest.raises(UserError, match=said):
        measure(finished_run, names)


def test_a_run_that_has_gone_is_refused_and_its_folder_not_made(finished_run, tmp_path):
    gone = tmp_path / "runs" / "gone"
    with pytest.raises(UserError, match="gone is not a folder; name one of `ctxkv list`, or make"):
        measure(replace(finished_run, path=gone))
    assert not gone.parent.exists()


def test_a_run_without_its_artefacts_keeps_its_measurements_and_gets_no_new_ones(tiny_config, tmp_path):
    finished = measure(run(tiny_config, tmp_path / "run"), ["generation"])
    folder = RunFolder(finished.path)
    with folder.claimed(tiny_config):
        folder.drop_artefacts()
    assert measure(finished, ["generation"]).summary == finished.summary
    with pytest.raises(UserError, match="is dropped; make it again with `ctxkv run"):
        measure(finished, ["probe"])
    again = run(tiny_config, finished.path)
    assert again.summary["generation"] == finished.summary["generation"]


def test_measurements_of_a_file_that_has_changed_are_refused(tiny_config, tmp_path):
    finished, data = run(tiny_config, tmp_path / "run"), Path(tiny_config.data.path)
    text = data.read_text(encoding="utf-8")
    for split, row in (("train", 0), ("test", 8), ("validation", 11)):
        lines = text.splitlines(keepends=True)
        lines[row] = lines[row].replace('"content": "', '"content": "another ', 1)
        data.write_text("".join(lines), encoding="utf-8")
        with pytest.raises(UserError, match=rf"The {split} conversations in .* are not those that .*run was"):
            measure(finished, ["repeated_pairs"])
    data.write_text(text, encoding="utf-8")
    assert "repeated_pairs" in measure(finished, ["repeated_pairs"]).summary


KINDS = ("kneser_ney_cache", "kneser_ney_caches")


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
    table = {kind.replace("ney", "ney_table"): counted for kind in KINDS}
    assert ngrams.of_run(config, folder, None) == {kind: [1, 2] for kind in KINDS} | table
    said: list[str] = []
    monkeypatch.setattr(ngrams, "say", said.append)
    monkeypatch.setattr(ngrams, "MOST_COUNTED", len(counted))
    assert table.items() <= ngrams.of_run(config, folder, None).items()
    monkeypatch.setattr(ngrams, "MOST_COUNTED", len(counted) - 1)
    assert ngrams.of_run(config, folder, None) == {kind: [1, 2] for kind in KINDS}
    most = len(counted) - 1
    assert said == [f"No n-grams of the table's text: {most + 1} tokens are more than {most}."]
