import shutil
from operator import itemgetter
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import TOP, local_experiment, write_conversations
from test_cli import settings_of

from ctxkv_lib import experiments as experiment
from ctxkv_lib.cli import main
from ctxkv_lib.errors import Stopped, UserError
from ctxkv_lib.files import read_json
from ctxkv_lib.locks import only_process
from ctxkv_lib.research import measure as measure_module
from ctxkv_lib.research import sweep as module
from ctxkv_lib.research.protocol import grid_points, points_around, read_protocol
from ctxkv_lib.research.sweep import finished_runs, identity, sweep
from ctxkv_lib.research.sweep_file import read_sweep
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.listing import list_runs
from ctxkv_lib.runs.models import shapes
from ctxkv_lib.runs.run_folder import RunFolder, load_run, run_folder_of
from ctxkv_lib.runs.trained import load_trained
from ctxkv_lib.runs.verification import verify

STUDY = TOP / "notebooks" / "study" / "results"


@pytest.fixture
def small(tmp_path):
    """Settings of runs that take half a second."""
    return {**local_experiment(tmp_path), "phase1.max_iterations": 2, "phase2.max_epochs": 1}


@pytest.fixture
def points(small):
    """A function that makes grid points around the small experiment."""
    return lambda *seeds, **variants: points_around(
        build_config("ci", samples=8, settings=small), variants or {"plain": {}}, seeds or (1,)
    )


def written(out):
    """The results in a folder, whose file has nothing twice."""
    stored = read_json(out / "sweep.json")
    cells = [cell for row in stored["rows"] for cell in row["cells"]]
    assert not any(cell.get("state") == "finished" or "variant" in cell for cell in cells)
    assert not any({"val_ppl", "seeds"} & set(row) for row in stored["rows"])
    return read_sweep(out / "sweep.json")


def states(results):
    return [(entry["variant"], entry["state"]) for entry in results["cells"]]


def raising(contexts):
    if len(contexts) > 2:  # more than are tried before
        raise KeyError("a word")
    return contexts.mean()


LOSSES = {"spread": lambda contexts: -contexts.var()}


def test_a_lambda_is_an_idea_of_a_sweep(points):
    (point,) = points(spread={"loss": LOSSES["spread"]})
    assert identity(point.config) != identity(points()[0].config)


@pytest.mark.slow
def test_failing_and_diverging_runs_are_recorded_and_the_others_go_on(points, tmp_path):
    asked = points(
        diverges={"phase2.learning_rate": 1e30},
        fails={"model.interval": 5000},
        raises={"loss": raising},
        works={},
    )
    said, out = [], tmp_path / "out"
    results = sweep(asked, out, out, tell=said.append)
    assert states(results) == [
        *(("diverges", "diverged"), ("fails", "failed")),
        *(("raises", "failed"), ("works", "finished")),
    ]
    assert "1 of 4: diverges, 8 samples, seed 1: diverged: Phase 2 diverged in epoch 1" in said[0]
    assert written(out) == results
    assert [row["variant"] for row in results["rows"]] == [
        "works",
        "n-grams",
        "n-grams and cache",
        "n-grams and caches",
    ]
    assert results["rows"][0]["measured"]["effective_rank"] > 0
    document = (out / "sweep.md").read_text()
    for text in ("1 diverged, 2 failed, 1 finished.", "one context window", "lower phase2.learning\\_rate"):
        assert text in document
    assert (out / "sweep.png").is_file()
    assert states(sweep(asked, out, out, tell=said.append)) == states(results)
    assert [line[:6] for line in said[4:]] == ["2 of 4", "3 of 4"]  # what failed is tried again
    shutil.rmtree(asked[0].folder(out))
    sweep(asked[:1], out, out, tell=said.append)
    assert said[6].startswith("1 of 1: diverges")


@pytest.mark.slow
@pytest.mark.parametrize("problem", [RuntimeError("of shapes"), UserError("of memory")])
def test_a_run_that_cannot_be_measured_is_finished(points, tmp_path, monkeypatch, capsys, problem):
    monkeypatch.setattr(module, "measure", Mock(side_effect=problem))
    for _ in range(2):
        assert states(sweep(points(), tmp_path, tmp_path / "out", keep=True)) == [("plain", "finished")]
        assert f"is not measured: {problem}" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_was(points, tmp_path, monkeypatch):
    asked, out, began = points(1, 2, 3), tmp_path / "out", []

    def counted(config, folder, listener):
        began.append(config.runtime.seed)
        if began == [1, 2]:
            raise KeyboardInterrupt
        return experiment.run(config, folder, listener)

    monkeypatch.setattr(module, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(asked, out, out)
    kept = written(out)
    assert [state for _, state in states(kept)] == ["finished"]
    metrics = []
    results = sweep(asked, out, out, metrics.append)
    assert began == [1, 2, 2, 3]
    assert {metric["run"] for metric in metrics} == {str(point) for point in asked[1:]}
    (runs,) = finished_runs(asked, out).values()
    assert results["rows"][0]["seeds"] == [1, 2, 3]
    assert results["rows"][0]["val_ppl"] == [float(f"{run.summary['phase2']['val_ppl']:.6g}") for run in runs]
    assert results["cells"][0] == kept["cells"][0]


@pytest.mark.slow
def test_a_run_that_was_stopped_while_it_was_measured_keeps_nothing_large(points, tmp_path, monkeypatch):
    asked, makers = points(), measure_module.MAKERS
    stopped = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(measure_module, "MAKERS", {**makers, "ablations": stopped})
    with pytest.raises(KeyboardInterrupt):
        sweep(asked, tmp_path, tmp_path / "out")
    folder = RunFolder(asked[0].folder(tmp_path))
    assert folder.model.is_dir()
    monkeypatch.setattr(measure_module, "MAKERS", makers)
    assert states(sweep(asked, tmp_path, tmp_path / "out")) == [("plain", "finished")]
    assert "ablations" in load_run(folder.path).summary
    assert not folder.model.exists()
    assert not folder.caches.exists()


@pytest.mark.parametrize("work", ["load_conversations", "write_text"])
def test_a_stop_outside_of_the_runs_says_its_line_too(points, tmp_path, monkeypatch, work):
    monkeypatch.setattr(module, work, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(Stopped, match="Finished stages are kept; run the cell again"):
        sweep(points(), tmp_path / "runs", tmp_path / "out", hours=0)


def test_a_sweep_of_nothing_or_of_too_much_is_refused_and_leaves_results_alone(points, tmp_path):
    for asked, said in (([], "at least one"), (points(a={}, b={"data.samples": 99}), "99 for training")):
        with pytest.raises(UserError, match=said):
            sweep(asked, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_time_that_is_over_leaves_runs_for_the_next_call(points, tmp_path):
    with pytest.raises(UserError, match="--hours is nan; allowed: 0 or more"):
        sweep(points(), tmp_path, tmp_path / "out", hours=float("nan"))
    out = tmp_path / "out"
    (out / "below").mkdir(parents=True)
    left_over, in_use = (folder / ".sweep.md.1.part" for folder in (out, out / "below"))
    for file in (left_over, in_use):
        file.touch()
    assert states(sweep(iter(points(1, 2)), str(tmp_path), str(out), hours=0)) == [("plain", "waiting")] * 2
    assert "2 waiting." in (out / "sweep.md").read_text()
    assert (left_over.exists(), in_use.exists()) == (False, True)
    with only_process(out), pytest.raises(UserError, match="is in use by process"):
        sweep(points(1, 2), tmp_path, out, hours=0)


@pytest.mark.slow
def test_finished_runs_share_phase_1_and_keep_their_results_and_nothing_large(
    points, tmp_path, printed_by, capsys
):
    asked, out = points(a={}, b={"phase2.learning_rate": 2e-3}, same={}), tmp_path / "out"
    first, _, same = sweep(asked, out, out)["cells"]
    assert same == {**first, "variant": "same"}
    said = capsys.readouterr().err
    assert "Stage phase1 is taken from" in said
    assert "made again" not in said
    folder = asked[0].folder(out)
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 2**20
    assert [file.stem for file in folder.rglob("*.safetensors")] == ["context_block"]  # which others share
    before = load_run(folder).summary["phase2"]
    printed_by("report", folder)
    assert [found.state for found in list_runs(out)] == ["results only"] * 2
    checked = verify(folder)
    assert checked.intact
    assert {each.state for each in checked.artefacts if each.stage == "model"} == {"dropped"}
    with pytest.raises(UserError, match="is dropped; make it again with `ctxkv run"):
        load_trained(folder, "cpu")
    capsys.readouterr()
    again = experiment.run(asked[0].config, folder)
    said = capsys.readouterr().err
    assert "train_ctx.safetensors is dropped: caches is made again" in said
    assert "phase1" not in said
    assert again.summary["phase2"]["val_ppl"] == before["val_ppl"]
    sweep(asked, out, out)  # what is there is not dropped
    load_trained(folder, "cpu")
    assert sorted(found.state for found in list_runs(out)) == ["finished", "results only"]


@pytest.mark.slow
def test_what_is_to_be_kept_is_kept_and_not_measured_again(points, tmp_path, monkeypatch):
    before = sweep(points(), tmp_path, tmp_path / "out", keep=True)
    load_trained(points()[0].folder(tmp_path), "cpu")
    monkeypatch.setattr(module, "measure", None)
    assert sweep(points(), tmp_path, tmp_path / "out", keep=True) == before


def test_a_file_in_the_home_folder_is_the_same_as_by_its_whole_path(tmp_path, monkeypatch):
    write_conversations(tmp_path / "mine.jsonl", 12)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"data.source": "file", "data.table": "random", "data.validation_samples": 2}
    near, whole = (
        build_config("ci", samples=4, settings={**settings, "data.path": f"{folder}/mine.jsonl"})
        for folder in ("~", tmp_path)
    )
    assert run_folder_of(near) == run_folder_of(whole)
    assert identity(near)


@pytest.mark.slow
def test_a_file_that_has_moved_is_not_swept_again_and_one_that_has_changed_is(
    points, small, tmp_path, monkeypatch
):
    roots, out = (tmp_path / "runs", tmp_path / "others"), tmp_path / "out"
    before = sweep(points(), roots[0], out)["cells"]
    moved = Path(small["data.path"]).rename(tmp_path / "moved.jsonl")
    small["data.path"] = str(moved)
    with monkeypatch.context() as patch:
        patch.setattr(module, "run", None)
        for root in roots:  # with the run folder, and from results alone
            assert sweep(points(), root, out)["cells"] == before
    assert finished_runs(points(), roots[0]).keys() == {"plain"}
    write_conversations(moved, 12, seed=4)
    for root in roots:
        (entry,) = sweep(points(), root, out)["cells"]
        assert entry["config"] != before[0]["config"]
        assert entry["val_ppl"] != before[0]["val_ppl"]


def test_a_sweep_that_stops_before_its_first_run_leaves_no_run_folder(points, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "read_texts", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(Stopped):
        sweep(points(), tmp_path / "runs", tmp_path / "out")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_results_of_other_grid_points_are_kept_beside(points, tmp_path, capsys):
    out = tmp_path / "out"
    sweep(points(a={}), tmp_path / "runs", out)
    sweep(points(a={}, b={"phase2.learning_rate": 2e-3}), tmp_path / "runs", out, hours=0)
    assert [file.name for file in out.glob("sweep*.json")] == ["sweep.json"]  # nothing is lost
    sweep(points(b={"phase2.learning_rate": 2e-3}), tmp_path / "runs", out, hours=0)
    (kept,) = out.glob("sweep-*.json")
    assert states(read_sweep(kept)) == [("a", "finished")]
    assert f"1 result of other grid points: they are kept in {kept}" in capsys.readouterr().err


@pytest.mark.slow
def test_results_that_were_passed_on_count_where_no_files_are_to_be_kept(points, tmp_path, monkeypatch):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    sweep(points(), tmp_path / "runs", out)
    before = written(out)
    monkeypatch.setattr(module, "run", Mock(side_effect=UserError("run again")))
    assert states(sweep(points(same={}), elsewhere, out)) == [("same", "finished")]
    again = written(out)
    assert again["cells"] == [{**before["cells"][0], "variant": "same"}]
    assert again["ngrams"] == before["ngrams"]
    assert again["ngrams"]["8"]["kneser_ney"]["val_ppl"] > 1
    found = sweep(points(plain={}, other={"phase2.patience": 1}), elsewhere, out)
    assert states(found) == [("plain", "finished"), ("other", "failed")]
    assert found["cells"][1]["error"] == "run again"
    said = []
    kept = sweep(points(), elsewhere, out, keep=True, tell=said.append)  # its files have to be made again
    assert said == ["1 of 1: plain, 8 samples, seed 1: failed: run again"]
    assert kept["cells"] == [{**before["cells"][0], "variant": "plain"}]
    assert written(out) == kept
    assert [file.name for file in out.glob("*.json")] == ["sweep.json"]  # a failed run is no loss
    monkeypatch.setattr(module, "run", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        sweep(points(other={"phase2.patience": 1}), elsewhere, out)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "<<<<<<< HEAD\n" + text,
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"ngrams"', '"counted"'),
        lambda text: text.replace('"best_epoch"', '"best"'),
        lambda text: text.replace('"recipe"', '"method"'),
        lambda text: "[]",
    ],
)
def test_damaged_results_are_refused_and_left_as_they_are(small, tmp_path, printed_by, damage):
    left = tmp_path / "out" / "sweep.json"
    left.parent.mkdir()
    left.write_text(damage((STUDY / "memory" / "sweep.json").read_text()))
    before = left.read_text()
    common = [*settings_of(small), "--preset", "ci", "--samples", "8"]
    said = printed_by("sweep", *common, "--out", left.parent, code=2)
    assert f"{left} is damaged, or not what a sweep wrote; restore it" in said
    assert left.read_text() == before
    assert [file.name for file in left.parent.iterdir() if not file.name.startswith(".")] == ["sweep.json"]


@pytest.mark.parametrize("part", sorted(path.parent.name for path in STUDY.glob("*/sweep.json")))
def test_the_committed_studies_go_on_from_their_results(part, tmp_path, monkeypatch):
    """Every finished grid point is found, with as many trained weights, and the same files are written."""
    points, out = grid_points(read_protocol(STUDY.parent / f"{part}.json"), lambda _: None), tmp_path / part
    shutil.copytree(STUDY / part, out)
    monkeypatch.setattr(module, "run", None)
    kept = written(out)["cells"]
    results = sweep(points, tmp_path / "runs", out, hours=0)
    entries, trained = (
        results["cells"],
        {(r["variant"], r["samples"]): r.get("trained") for r in results["rows"]},
    )
    there = [entry for entry in entries if entry["state"] != "waiting"]
    assert kept
    assert sorted(there, key=itemgetter("config")) == sorted(kept, key=itemgetter("config"))
    for entry, point in zip(entries, points, strict=True):
        if entry["state"] == "finished":
            weights = shapes(point.config)[0]["trainable_phase2"]
            assert trained[entry["variant"], entry["samples"]] == weights
    for name in ("sweep.json", "sweep.md"):
        assert (out / name).read_text() == (STUDY / part / name).read_text()


@pytest.mark.slow
def test_the_command_leaves_and_prints_its_table(small, tmp_path, printed_by, capsys):
    common = [*settings_of(small), "--preset", "ci", "--samples", "8", "--seeds", "1", "2"]
    out = tmp_path / "out"
    places = ["--out", out, "--runs", tmp_path / "runs"]
    table = printed_by("sweep", *common, "--grid", "phase2.weight_decay=1", *places)
    assert table.splitlines()[0].split()[:3] == ["Variant", "Samples", "Seeds"]
    assert table.count("weight_decay 1 ") == 1
    assert " ± " in table
    assert len(list((tmp_path / "runs").glob("ci-exact-8-*"))) == 2
    assert written(out)["variants"]["weight_decay 1"]["settings"]["phase2.weight_decay"] == 1
    none = tmp_path / "none"
    assert main(["sweep", *common, "--grid", "model.interval=5000", "--out", str(none)]) == 2
    assert f"No run has finished; {none / 'sweep.md'} says why." in capsys.readouterr().err
