"""Steps are reused if their inputs are the same and their files are intact; nothing else is shown or kept.

The experiment is a toy (`toy_runs`), so that runs can be disturbed at each of their file operations. `make
torture` does so at all of them, and the suite at some.
"""

import json
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disturbances import DAMAGES, in_child, places
from toy_runs import (
    NEW_CONTEXTS,
    NEW_PHASE2,
    NEW_TEST,
    OTHER_CORPUS,
    OTHER_MACHINE,
    OTHER_PHASE1,
    OTHER_PHASE2,
    OTHER_TEST,
    OTHER_TRAIN,
    RETRAINED,
    STATE,
    WEIGHTS,
    A,
    summary_of,
)

from ctxkv_lib import store
from ctxkv_lib.errors import UserError
from ctxkv_lib.files import read_json, write_text
from ctxkv_lib.runs.config import ExperimentConfig
from ctxkv_lib.runs.steps import RunFolder, claimed, config_of, describe, finished, records
from ctxkv_lib.store import Record, entry_folder, inputs_of

ALL = (A, OTHER_TRAIN, OTHER_TEST, OTHER_CORPUS, NEW_CONTEXTS, NEW_PHASE2, NEW_TEST)


@pytest.fixture(autouse=True)
def here(own_store, tmp_path):
    return tmp_path


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return a function that runs an experiment undisturbed, and returns what it must leave in its folder."""
    known = {}

    def expect(toy):
        if repr(toy) not in known:
            root = tmp_path_factory.mktemp("alone")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CTXKV_CACHE", str(root / "store"))
                toy.run(root / "run")
                known[repr(toy)] = left_in(root / "run") | {"contexts": toy.contexts(root / "run")}
        return known[repr(toy)]

    return expect


def left_in(path: Path) -> dict:
    """Return the summary, the lines of metrics, the report and the weights in a run folder."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return {
        "summary": read_json(path / "summary.json"),
        "metrics": [json.loads(line) for line in lines],
        "report": (path / "report.md").read_text(),
        "weights": (path / WEIGHTS).read_text(),
    }


def trained(path):
    """Return the bytes of an intact trained Phase 2, or None."""
    try:
        finished(path, "phase2")
        return [(path / name).read_bytes() for name in ("steps/phase2.json", WEIGHTS)]
    except (UserError, OSError):
        return None


def check_shown(path, expect, *toys):
    """Check that what a folder shows is the result of one of these experiments, all of it of the same one."""
    known, shown = [expect(toy) for toy in toys], None
    try:
        (shown,) = [right for right in known if right["summary"] == summary_of(path)]
        assert (path / WEIGHTS).read_text() == shown["weights"]
    except UserError:
        pass
    possible = [shown] if shown else known
    if (path / "summary.json").is_file():
        assert read_json(path / "summary.json") in [right["summary"] for right in possible]
    if (path / "report.md").is_file():
        assert (path / "report.md").read_text() in [right["report"] for right in possible]


def finish(path, expect, toy, may_refuse=False):
    """Run to the end, with `again` only if the run is refused without it, and check what it leaves."""
    before = trained(path)
    ended = in_child(lambda: toy.run(path))
    if ended.how == "refused":
        assert may_refuse, ended
        assert "--again" in ended.value
        assert trained(path) == before
        ended = in_child(lambda: toy.run(path, again=True))
    elif before:
        assert trained(path) == before  # it was not replaced unasked
    assert ended.how == "done", ended
    check_finished(path, expect, toy)
    return ended


def check_finished(path, expect, toy):
    right = expect(toy)
    assert left_in(path) | {"contexts": toy.contexts(path)} == right
    assert summary_of(path) == right["summary"]
    assert not [*path.rglob(".*.part"), *path.glob(STATE)]
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    ended = in_child(lambda: toy.run(path))
    assert (ended.how, ended.said) == ("done", "")  # nothing is computed again
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == files


@pytest.fixture
def path(here):
    A.run(here / "run")
    return here / "run"


def test_a_finished_run_is_reused_and_its_metrics_are_replayed(path, expected):
    heard = []
    assert A.run(path, listener=heard.append) == expected(A)["summary"]
    assert [metric["stage"] for metric in heard if metric["replayed"]] == 2 * ["phase1"] + 3 * ["phase2"]
    check_finished(path, expected, A)


def test_runs_that_differ_in_phase_2_compute_their_contexts_once(path, here, expected):
    heard = []
    OTHER_PHASE2.run(here / "new", listener=heard.append)
    assert [metric.get("replayed", False) for metric in heard] == [True] * 2 + [False] * 3
    check_finished(here / "new", expected, OTHER_PHASE2)
    assert len([*(here / "store").glob("contexts-*")]) == 1


def test_an_entry_that_two_need_at_once_is_computed_once(here, monkeypatch):
    computed, other_waits = [], threading.Event()

    def compute(work):
        assert other_waits.wait(timeout=5), "nobody waited for this entry"
        write_text(work.folder / "file", "contents")
        computed.append(work)
        return {}

    monkeypatch.setattr(store, "log", lambda message: other_waits.set() if "waiting" in message else None)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(store.entry, "toys", inputs_of({}, {}), compute, ["file"]) for _ in range(2)]
    assert calls[0].result() == calls[1].result()
    assert len(computed) == 1


@pytest.mark.parametrize(
    ("toy", "reason"),
    [
        (OTHER_TRAIN, "a trained model, but the train text differs; replace it with --again"),
        (OTHER_CORPUS, "but the corpus text differs"),
        (NEW_PHASE2, r"but results version of phase2 1 → 2; replace it with --again \(again=True\)"),
        (NEW_CONTEXTS, "but results version of contexts 1 → 2"),
    ],
)
def test_a_trained_model_is_replaced_only_if_asked(path, expected, toy, reason):
    before = trained(path)
    with pytest.raises(UserError, match=reason):
        toy.run(path)
    assert trained(path) == before
    check_finished(path, expected, A)
    assert toy.run(path, again=True) == expected(toy)["summary"]
    check_finished(path, expected, toy)


@pytest.mark.parametrize("toy", [OTHER_PHASE1, OTHER_PHASE2])
@pytest.mark.parametrize("lost", ["nothing", "steps/settings.json"])
def test_other_settings_are_another_experiment(path, expected, toy, lost):
    (path / lost).unlink(missing_ok=True)
    (name, value), *_ = toy.settings.items()
    for again in (False, True):
        with pytest.raises(
            UserError, match=f"another experiment: {name} .* → {value}; choose another folder"
        ):
            toy.run(path, again)
    finish(path, expected, A)


@pytest.mark.parametrize("toy", [OTHER_TEST, NEW_TEST])
def test_a_changed_test_is_computed_again_without_being_asked(path, expected, capsys, toy):
    before = trained(path)
    (path / "report.md").write_text("mine")
    toy.run(path)
    assert trained(path) == before
    assert "test: computed again, since" in capsys.readouterr().err
    check_finished(path, expected, toy)  # the report is that of the new test


def test_a_setting_that_is_new_has_had_its_default(path, expected):
    """The records of an older version lack a setting. The same value is the same experiment."""
    defaults = ExperimentConfig().flat()
    for file in (path / "steps").glob("*.json"):
        record = Record.read(file)
        for inputs in every(record.inputs):
            inputs["settings"].pop("phase2.learning_rate", None)
        record.write(file)
    old = records(path)["phase2"].inputs
    asked = inputs_of({**old["settings"], "phase2.learning_rate": defaults["phase2.learning_rate"]}, {})
    assert describe(old, asked | {"before": old["before"]}, defaults) == ""
    changed = inputs_of({**old["settings"], "phase2.learning_rate": 0.5}, {}) | {"before": old["before"]}
    assert describe(old, changed, defaults) == "phase2.learning_rate 0.001 → 0.5"


def every(inputs):
    yield inputs
    for before in inputs["before"].values():
        yield from every(before)


def test_differences_are_described_by_name_and_value():
    old = inputs_of({"a.x": 1, "a.y": [1, 2], "data.path": "/a"}, {"text": "1", "code of a": "2"})
    new = inputs_of({"a.x": 2, "a.y": (1, 2), "data.path": "/b"}, {"text": "3"})
    assert describe(old, new, {}) == "a.x 1 → 2, the text differs"
    many = inputs_of({f"a.{n}": 1 for n in range(5)}, {})
    assert describe(inputs_of({}, {}), many, {}).endswith("a.2 None → 1 and 2 more")
    assert describe(inputs_of({}, {}, table=old), inputs_of({}, {}, table=new), {}).startswith("a.x 1 → 2")


def test_the_store_may_be_deleted_at_any_time(path, expected, here):
    shutil.rmtree(here / "store")
    assert summary_of(path) == expected(A)["summary"]
    check_finished(path, expected, A)
    shutil.rmtree(here / "store", ignore_errors=True)
    OTHER_TEST.run(path)
    check_finished(path, expected, OTHER_TEST)


def stopped(path, epoch=2, toy=A, again=False):
    """Stop a run after an epoch of Phase 2."""

    def stop(metric):
        if metric.get("epoch") == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.run(path, again, stop)


def epochs_trained(toy, path):
    """Finish a run, and return the epochs that are trained, not restored."""
    heard = []
    toy.run(path, listener=heard.append)
    return [metric["epoch"] for metric in heard if "epoch" in metric and not metric.get("replayed")]


def test_a_stopped_run_continues_even_if_the_store_is_lost(here, expected):
    stopped(here / "run")
    shutil.rmtree(here / "store")
    assert epochs_trained(A, here / "run") == [3]
    check_finished(here / "run", expected, A)


def test_a_run_that_is_continued_where_contexts_have_other_bytes_starts_phase_2_again(here):
    stopped(here / "run")
    shutil.rmtree(here / "store")
    assert epochs_trained(OTHER_MACHINE, here / "run") == [1, 2, 3]
    used = records(here / "run")["phase2"].uses
    OTHER_MACHINE.run(here / "run")
    assert records(here / "run")["phase2"].uses == used


def test_a_state_of_other_inputs_is_not_used(here, expected):
    stopped(here / "run")
    assert epochs_trained(NEW_PHASE2, here / "run") == [1, 2, 3]
    check_finished(here / "run", expected, NEW_PHASE2)


def test_a_finished_run_never_mixes_with_what_another_machine_computes(path, here, expected):
    """The store is lost, another machine fills it, and the test is computed with the run's own files."""
    shutil.rmtree(here / "store")
    OTHER_MACHINE.run(here / "beside")
    assert A.contexts(path) == expected(A)["contexts"]
    OTHER_TEST.run(path)
    check_finished(path, expected, OTHER_TEST)


def test_a_table_with_other_bytes_does_not_serve_weights_that_were_trained_with_the_old_one(path, here):
    (path / "token_vectors.safetensors").unlink()
    shutil.rmtree(here / "store")
    with pytest.raises(UserError, match="an earlier step was computed again; replace it with --again"):
        OTHER_MACHINE.run(path)
    with pytest.raises(UserError, match="has not finished"):
        summary_of(path)
    OTHER_MACHINE.run(path, again=True)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_repaired_or_refused_but_never_shown(here, path, expected, damage):
    for name in sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file()):
        if name.suffix not in (".lock", ".md") and name.name != ".lock":
            copy = Path(shutil.copytree(path, here / "copy"))
            damage(copy / name)
            if name.name != "summary.json":  # the package itself reads the records
                check_shown(copy, expected, A)
            ended = finish(copy, expected, A, may_refuse=name.name in (WEIGHTS, "phase2.json"))
            assert "trained model" not in ended.said
            shutil.rmtree(copy)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_computed_again(here, expected, damage):
    for name in ("block", "entry.json", "token_vectors.safetensors"):
        stopped(here / "run")
        for file in (here / "store").rglob(name):
            damage(file)
        finish(here / "run", expected, A)
        shutil.rmtree(here / "run")
        shutil.rmtree(here / "store")


def test_files_of_another_run_are_noticed(here, path, expected):
    OTHER_PHASE2.run(here / "other")
    for name in (WEIGHTS, "steps/phase2.json", "steps/test.json", "steps/settings.json", "config.json"):
        copy = Path(shutil.copytree(path, here / "copy"))
        shutil.copyfile(here / "other" / name, copy / name)
        check_shown(copy, expected, A)
        ended = in_child(lambda copy=copy: A.run(copy))
        if ended.how == "refused":
            assert "another folder" in ended.value
        else:
            check_finished(copy, expected, A)
        shutil.rmtree(copy)


def test_whole_entries_that_are_exchanged_are_noticed(here, expected):
    stopped(here / "run")
    stopped(here / "other", toy=OTHER_PHASE1)
    first, second = (entry_folder("contexts", toy.inputs["contexts"]) for toy in (A, OTHER_PHASE1))
    first.rename(here / "aside")
    second.rename(first)
    (here / "aside").rename(second)
    finish(here / "run", expected, A)


def test_an_edited_report_is_kept_until_the_numbers_change(path, expected):
    (path / "report.md").write_text("mine")
    (path / "summary.json").unlink()
    A.run(path)
    assert (path / "report.md").read_text() == "mine"
    NEW_PHASE2.run(path, again=True)
    check_finished(path, expected, NEW_PHASE2)


def test_folders_of_other_things_are_refused_and_left(here, path):
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and does not contain a run; choose another folder"):
        A.run(here / "full")
    assert [file.name for file in (here / "full").iterdir() if file.name != ".lock"] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        A.run(here / "full" / "thesis.tex")
    with pytest.raises(UserError, match="is not a run but contains runs; choose one of them"):
        finished(here)
    with claimed(RunFolder(path)), pytest.raises(UserError, match="is in use by another process; wait"):
        A.run(path)


def test_a_folder_of_version_0_4_is_refused_in_a_sentence(here):
    (here / "old" / "checkpoint").mkdir(parents=True)
    for use in (finished, A.run):
        with pytest.raises(
            UserError, match="contains a run of another version of ctxkv_lib; use that version, or"
        ):
            use(here / "old")


def test_a_setting_that_this_version_does_not_know_is_of_another_version(path):
    record = records(path)["settings"]
    record.numbers["config"]["phase2"]["momentum"] = 1
    record.write(path / "steps" / "settings.json")
    with pytest.raises(UserError, match="another version of ctxkv_lib; use that version, or train again in"):
        config_of(path)


def everywhere(here, expect, stride, prepare, act, then, toys, kinds=("kill", "full", "wipe")):
    """Disturb `act` at its file operations, and check that `then` ends right."""
    prepare(here / "base")
    base = {name: here / "base" / name for name in ("run", "store")}
    # The store of the test is a link to the store of the attempt.
    attempt, place = here / "attempt", os.environ["CTXKV_CACHE"]
    total, tried = 0, 0
    for kind in kinds:
        at = 0
        while not total or at < total:
            shutil.rmtree(attempt, ignore_errors=True)
            shutil.rmtree(place, ignore_errors=True)
            attempt.mkdir()
            if base["run"].exists():
                shutil.copytree(base["run"], attempt / "run")
            if base["store"].exists():
                shutil.copytree(base["store"], place)
            if not total:
                total = in_child(lambda: act(attempt / "run")).operations
                assert total > 20
                at = tried % stride
                continue
            in_child(lambda: act(attempt / "run"), kind, at)
            check_shown(attempt / "run", expect, *toys)
            then(attempt / "run")
            at, tried = at + stride, tried + 1
        at = 0
    print(f"{tried} of {3 * total} places")


def base_of(*toys, stop=False):
    """Return a function that prepares a folder with `run` and `store`."""

    def prepare(base):
        base.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CTXKV_CACHE", str(base / "store"))
            for toy in toys:
                if stop:
                    stopped(base / "run", toy=toy)
                else:
                    toy.run(base / "run", again=True)

    return prepare


# Each story has a finished run to begin with, whether it was stopped instead, the run that is disturbed,
# `again`, and the run that follows.
STORIES = {
    "new": ((), False, A, False, A),
    "stopped in Phase 2": ((A,), True, A, False, A),
    "again with other code": ((A,), False, NEW_PHASE2, True, NEW_PHASE2),
    "again with other code, then the old code": ((A,), False, NEW_CONTEXTS, True, A),
    "again with another text": ((A,), False, OTHER_TRAIN, True, OTHER_TRAIN),
    "again with another corpus, then the old one": ((A,), False, OTHER_CORPUS, True, A),
    "another test": ((A,), False, OTHER_TEST, False, OTHER_TEST),
    "another test, then the old one": ((A,), False, OTHER_TEST, False, A),
}


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("story", STORIES)
def test_a_disturbance_at_any_file_operation_leaves_nothing_wrong(here, expected, story, stride):
    begun, is_stopped, disturbed, again, then = STORIES[story]

    def follow(path):
        finish(path, expected, then, may_refuse=then in RETRAINED or disturbed in RETRAINED)

    toys = {repr(toy): toy for toy in (*begun, disturbed)}.values()
    prepare = base_of(*begun, stop=is_stopped)
    everywhere(here, expected, stride, prepare, lambda path: disturbed.run(path, again), follow, toys)


@pytest.mark.parametrize("rounds", [12, pytest.param(200, marks=pytest.mark.nightly)])
def test_random_sequences_of_disturbed_runs_end_right(here, expected, rounds):
    draw, ended = random.Random(5), 0
    for number in range(rounds):
        path = here / str(number)
        for _ in range(draw.randrange(1, 5)):
            toy, again, at = draw.choice(ALL), draw.random() < 0.6, draw.randrange(150)
            kind = draw.choice(["kill", "full", "wipe"])
            in_child(lambda toy=toy, path=path, again=again: toy.run(path, again), kind, at)
            check_shown(path, expected, *ALL)
            if draw.random() < 0.2:
                shutil.rmtree(here / "store", ignore_errors=True)
        finish(path, expected, draw.choice(ALL), may_refuse=True)
        ended += 1
    print(f"{ended} sequences")


def test_places_cover_every_operation():
    assert [*places(5, 2, 3)] == [1, 3]
