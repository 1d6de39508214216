"""Stages are reused if their inputs are the same. Otherwise they are recomputed, linked or refused.

The stages here are toys that write small text files, so that runs can be killed at each of their file
operations. Different inputs always give different numbers.
"""

import itertools
import json
import multiprocessing
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from conftest import cut, flip

from ctxkv_lib.errors import UserError
from ctxkv_lib.files import digest, write_text
from ctxkv_lib.runs.driver import Stage, is_finished, prepare_folder, run_stages
from ctxkv_lib.runs.folder import RunFolder, claimed
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.runs.records import Record
from ctxkv_lib.runs.stages import settings_stage
from ctxkv_lib.runs.summary import finished_run

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Toy:
    """A toy experiment. Different values of `machine` stand for different rounding, which no table lists."""

    settings: dict = field(default_factory=lambda: {"phase1.rate": 0.1, "phase2.rate": 0.2})
    digests: dict = field(default_factory=lambda: {"code": "1", "training text": "a", "precision": "bf16"})
    test_text: str = "t"
    machine: int = 0

    def having(self, **digests):
        return replace(
            self, digests=self.digests | {name.replace("_", " "): v for name, v in digests.items()}
        )

    def setting(self, name, value):
        return replace(self, settings=self.settings | {name: value})

    def stages(self):
        def named(*names):
            return {name: (self.settings | self.digests)[name] for name in names}

        config = replace(build_config("ci", samples=3), preset=json.dumps(self.settings))
        settings = replace(settings_stage(config), made_from=self.settings)
        return [
            settings,
            Stage(
                "contexts",
                self.contexts,
                named("phase1.rate", *self.digests),
                (),
                ("checkpoint/context_block.safetensors", "caches"),
                is_linked=True,
            ),
            Stage(
                "phase2",
                self.phase2,
                named("phase2.rate", *self.digests),
                ("contexts",),
                ("checkpoint/layer.safetensors",),
                state="checkpoint/phase2.pt",
                is_collective=True,
            ),
            Stage(
                "model",
                lambda work: write_text(work.folder.path / "model/weights", "m") or {},
                {"saved": "1"},
                ("phase2",),
                ("model",),
                is_replaceable=True,
            ),
            Stage(
                "test",
                lambda work: {"ppl": number(read(work, "checkpoint/layer.safetensors"), self.test_text)},
                {"code": self.digests["code"], "test text": self.test_text},
                ("contexts", "phase2"),
            ),
            Stage(
                "results",
                self.results,
                {},
                ("settings", "contexts", "phase2", "model", "test", "ngrams"),
                ("summary.json",),
                ("report.md",),
                is_from_results=True,
            ),
        ]

    def contexts(self, work):
        value = number(self.settings["phase1.rate"], self.digests, self.machine)
        for iteration in (2, 3):
            work.record({"stage": "phase1", "iteration": iteration, "loss": value})
        write_text(work.folder.path / "checkpoint/context_block.safetensors", f"block {value}")
        for split in ("train", "val"):
            write_text(work.folder.path / f"caches/{split}", f"{split} {value}")
        return {"loss": value}

    def phase2(self, work):
        value = number(read(work, "caches/train"), self.settings["phase2.rate"], self.digests["code"])
        for epoch in (1, 2):
            work.record({"stage": "phase2", "epoch": epoch, "val_ppl": number(value, epoch)})
            write_text(work.folder.path / "checkpoint/phase2.pt", str(epoch))
        write_text(work.folder.path / "checkpoint/layer.safetensors", f"layer {value}")
        return {"val_ppl": value}

    def results(self, work):
        values = {name: work.folder.records[name].result for name in ("contexts", "phase2", "test")}
        write_text(work.folder.path / "summary.json", json.dumps(values))
        if not (work.folder.path / "report.md").is_file():
            write_text(work.folder.path / "report.md", str(values))
        return {}

    def run(self, path, again=False, listener=lambda _: None):
        with claimed(path, again) as folder:
            stages = self.stages()
            prepare_folder(folder, stages, again)
            if again or not is_finished(folder, stages):
                run_stages(folder, stages, CPU, listener, again)
        return shown(path)


def number(*values):
    return int(digest(values), 16) % 10**6 / 1000


def read(work, name):
    return (work.folder.path / name).read_text()


def shown(path):
    """Return what a reader sees of a run: the summary if the results are valid, else None."""
    folder = RunFolder.read(path)
    if not folder.holds("results") or any(record.damage(path) for record in folder.records.values()):
        return None
    return json.loads((path / "summary.json").read_text())


TOY = Toy()
SLOWER, OTHER_PHASE1 = TOY.setting("phase2.rate", 0.3), TOY.setting("phase1.rate", 0.3)
OTHER_CODE, OTHER_TEXT, FP32 = (
    TOY.having(code="2"),
    TOY.having(training_text="b"),
    TOY.having(precision="fp32"),
)
OTHER_TEST, OTHER_MACHINE = replace(TOY, test_text="u"), replace(TOY, machine=1)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return a function that computes the summary of an experiment in an undisturbed run."""
    shown_by = {}

    def expect(toy):
        if repr(toy) not in shown_by:
            shown_by[repr(toy)] = toy.run(tmp_path_factory.mktemp("alone") / "run")
        return shown_by[repr(toy)]

    return expect


@pytest.fixture
def finished(tmp_path):
    TOY.run(tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_reused_and_its_metrics_are_replayed_if_it_goes_on(finished, expected, capsys):
    heard = []
    assert TOY.run(finished, listener=heard.append) == expected(TOY)
    assert not heard  # `experiments.run` replays the metrics
    RunFolder.read(finished).drop("results")
    assert TOY.run(finished, listener=heard.append) == expected(TOY)
    assert [metric["stage"] for metric in heard if metric["replayed"]] == 2 * ["phase1"] + 2 * ["phase2"]
    assert "contexts: reused." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("toy", "reason"),
    [
        (SLOWER, r"another experiment: phase2\.rate 0\.2 instead of 0\.3; name another folder"),
        (OTHER_PHASE1, r"another experiment: phase1\.rate 0\.1 instead of 0\.3"),
        (OTHER_CODE, "a trained model, but the code differs; replace it with --again"),
        (OTHER_TEXT, "but the training text differs"),
        (OTHER_TEST, "but the test text differs"),
        (FP32, "but precision bf16 → fp32"),
    ],
)
def test_another_result_is_refused_and_a_different_setting_always(finished, expected, toy, reason):
    before = shown(finished)
    with pytest.raises(UserError, match=reason):
        toy.run(finished)
    assert shown(finished) == before
    if toy.settings == TOY.settings:
        assert toy.run(finished, again=True) == expected(toy)
    else:
        with pytest.raises(UserError, match="holds another experiment"):
            toy.run(finished, again=True)


def test_an_unfinished_run_says_what_is_recomputed_and_why(tmp_path, expected, capsys):
    def stop(metric):
        if metric["stage"] == "phase2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TOY.run(tmp_path / "run", listener=stop)
    assert OTHER_TEXT.run(tmp_path / "run") == expected(OTHER_TEXT)
    assert "contexts: recomputed, since the training text differs." in capsys.readouterr().err


def test_contexts_with_other_bytes_do_not_replace_what_was_trained_on_the_old_ones(finished, expected):
    """On another machine, the table of the contexts is the same, but their files differ."""
    (finished / "caches/train").unlink()
    with pytest.raises(UserError, match=r"a trained model, but the files of contexts differ; .*--again"):
        OTHER_MACHINE.run(finished)
    assert shown(finished) is None
    assert OTHER_MACHINE.run(finished, again=True) == expected(OTHER_MACHINE)


@pytest.mark.parametrize("can_link", [True, False])
def test_contexts_are_linked_from_an_intact_run_beside(finished, expected, monkeypatch, capsys, can_link):
    if not can_link:
        monkeypatch.setattr(os, "link", lambda *_: os.stat("/nowhere"))
    broken = Path(shutil.copytree(finished, finished.with_name("a broken one")))
    cut(broken / "caches/train")
    new = finished.with_name("new")
    assert SLOWER.run(new) == expected(SLOWER)
    assert "contexts: taken from run, which was made from the same inputs." in capsys.readouterr().err
    assert (new / "caches/train").samefile(finished / "caches/train") == can_link
    OTHER_CODE.run(finished, again=True)  # does not change the files of the other run
    assert shown(new) == expected(SLOWER)


def test_a_repair_keeps_an_edited_report_and_another_result_does_not(finished, expected):
    (finished / "report.md").write_text("mine")
    (finished / "model/weights").unlink()
    for name in ("config.json", "summary.json"):
        flip(finished / name)
    cut(finished / "checkpoint/contexts.json")
    assert TOY.run(finished) == expected(TOY)
    assert (finished / "report.md").read_text() == "mine"
    OTHER_TEST.run(finished, again=True)
    assert (finished / "report.md").read_text() != "mine"


def test_a_measurement_keeps_the_results_and_belongs_to_its_test(finished, expected):
    def measure(path):
        stages = TOY.stages()
        ngrams = Stage("ngrams", lambda _: {"ppl": 3.0}, {"code": "n"}, after=("test",))
        with claimed(path) as folder:
            run_stages(folder, [ngrams, stages[-1]], CPU, lambda _: None)

    measure(finished)
    assert TOY.run(finished) == expected(TOY)
    assert RunFolder.read(finished).holds("ngrams")
    OTHER_TEST.run(finished, again=True)
    assert not RunFolder.read(finished).holds("ngrams")


def test_folders_of_other_things_are_refused_and_left(finished, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run; name another folder"):
        TOY.run(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir() if path.name != ".lock"] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        TOY.run(tmp_path / "full" / "thesis.tex")
    with pytest.raises(UserError, match="is not a run but holds runs; name one of them"):
        RunFolder.open(tmp_path)
    with claimed(finished), pytest.raises(UserError, match="is in use by another process; wait"):
        TOY.run(finished)


def test_a_folder_of_an_older_version_is_refused_in_a_sentence(finished, expected):
    for file in (finished / "checkpoint").glob("*.json"):
        file.unlink()
    (finished / "checkpoint/stages.json").write_text("{}")
    for use in (RunFolder.open, TOY.run):
        with pytest.raises(UserError, match="holds a run of another version of ctxkv_lib"):
            use(finished)
    assert TOY.run(finished, again=True) == expected(TOY)
    assert not (finished / "checkpoint/stages.json").exists()


def test_the_state_of_a_training_goes_if_a_kill_came_between_its_record_and_the_removal(finished):
    (finished / "checkpoint/phase2.pt").write_text("2")
    RunFolder.read(finished).drop("results")
    TOY.run(finished)
    assert not (finished / "checkpoint/phase2.pt").exists()


def test_a_folder_in_which_nothing_was_computed_goes(tmp_path):
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "new"):
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()
    with claimed(tmp_path / "begun") as folder:
        folder.write("contexts", Record({}))
    with pytest.raises(UserError, match="has not finished; continue with `ctxkv run --out"):
        finished_run(RunFolder.read(tmp_path / "begun"))


def killed_at(place, act):
    """Run `act` in a child process that ends without warning before file operation number `place`."""

    def act_and_exit():
        places = itertools.count()
        for module, name in (
            (os, "replace"),
            (os, "unlink"),
            (os, "link"),
            (os, "mkdir"),
            (shutil, "rmtree"),
        ):
            operation = getattr(module, name)

            def counted(*args, operation=operation, **kwargs):
                if next(places) == place:
                    os._exit(9)
                return operation(*args, **kwargs)

            setattr(module, name, counted)
        act()
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=act_and_exit)
    child.start()
    child.join()
    return child.exitcode


# Each story has a finished run to start from (or None), the run that is killed, the value of its argument
# `again`, and the run that follows.
STORIES = {
    "a new run": (None, TOY, False, TOY),
    "again with different code": (TOY, OTHER_CODE, True, OTHER_CODE),
    "again with different code, then the old code": (TOY, OTHER_CODE, True, TOY),
    "again with another text": (TOY, OTHER_TEXT, True, OTHER_TEXT),
    "again with another test, then the old one": (TOY, OTHER_TEST, True, TOY),
}


def is_right(path, toys, expected):
    """Return whether a folder shows nothing, or the numbers of the experiment that its records describe."""
    folder, visible = RunFolder.read(path), shown(path)
    described = [toy for toy in toys if not any(stage.differences(folder) for stage in toy.stages())]
    return visible is None or [visible] == [expected(toy) for toy in described]


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.torture)])
@pytest.mark.parametrize("story", STORIES)
def test_a_kill_at_any_file_operation_leaves_nothing_stale(tmp_path, expected, story, stride):
    begun, killed, again, then = STORIES[story]
    source = tmp_path / "begun"
    if begun:
        begun.run(source)
    for place in range([*STORIES].index(story) % stride, 1000, stride):
        path = tmp_path / str(place)
        if begun:
            shutil.copytree(source, path)
        code = killed_at(place, lambda path=path: killed.run(path, again))
        assert is_right(path, filter(None, (begun, killed)), expected), place
        assert then.run(path, again) == expected(then), place
        shutil.rmtree(path)
        if code == 0:
            break
    assert place > 20
