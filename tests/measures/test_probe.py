"""The probe of a run: what it holds, where it goes, and that it reads contexts as they are."""

import json

import pytest
import torch
from conftest import local_experiment, tiny_ids, tiny_model

from ctxkv_lib import experiments as experiment
from ctxkv_lib.cli import main
from ctxkv_lib.experiments import probe_run, run
from ctxkv_lib.method.contexts import distinct_rows, exact_contexts
from ctxkv_lib.report import write_report
from ctxkv_lib.research.probe import distances, fresh_block, read_through
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.run_folder import Run
from ctxkv_lib.views.pictures import memory_of_contexts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    return run(build_config("ci", samples=8, settings=local_experiment(folder)), folder / "run")


def test_a_run_knows_what_its_contexts_remember(finished):
    found = finished.summary["probe"]
    assert list(found["fresh"]) == ["0.1", "0.01"]
    for block in (found, *found["fresh"].values()):
        assert [row["distance"] for row in block["recall"]] == distances(3, 12)
        assert 0 <= block["coverage"] <= 1
    assert (finished.path / "figures" / "probe.png").is_file()
    assert "probe.png" in write_report([finished])
    assert write_report([finished], "ja").count("| ") == write_report([finished]).count("| ")


def test_an_older_run_is_probed_when_asked(finished, monkeypatch, capsys):
    older = Run(
        finished.path, finished.config, {k: v for k, v in finished.summary.items() if k != "ablations"}, []
    )
    found, written = probe_run(older)
    assert found == {name: finished.summary[name] for name in ("probe", "ablations")}
    assert json.loads(written[0].read_text()) == found
    monkeypatch.setattr(experiment, "probe", None)  # in the summary already
    assert main(["probe", str(finished.path)]) == 0
    shown = capsys.readouterr().out
    assert "Horizon (tokens)" in shown
    assert "of another conversation" in shown


def test_the_figure_says_what_is_held_and_draws_every_slot(finished):
    found = {**finished.summary["probe"], "horizon": 1, "coverage": 2 / 3}
    seen, alone = memory_of_contexts(found, finished.config.model, slots=3).axes
    assert seen.get_title(loc="left") == "67% of the window is within some slot's memory span"
    (slots,) = [line for line in seen.get_lines() if line.get_marker() == "s"]
    assert slots.get_xdata().tolist() == [0, 3, 6]
    labels = [text.get_text() for text in alone.get_legend().get_texts()]
    assert [label.partition(":")[0] for label in labels] == [
        "trained",
        "untrained, weights 0.1",
        "untrained, weights 0.01",
    ]
    assert "memory span 1 token;" in labels[0]


def test_distances_reach_through_the_window():
    assert distances(20, 640)[:21] == list(range(21))
    assert distances(20, 640)[21:] == [30, 45, 67, 100, 150, 225, 337, 505]
    assert distances(3, 12) == [0, 1, 2, 3, 4, 6, 9]
    assert distances(1, 1) == [0]


@torch.no_grad()
def test_reading_one_by_one_is_the_recurrence():
    model = tiny_model()
    embeddings, tokens = distinct_rows(model, tiny_ids(300))
    half = model.context_block.project_tokens(embeddings)
    expected, _ = exact_contexts(model.context_block, half, tokens, 1e-5)
    whole, start = read_through(model.context_block, half, [tokens, tokens[:70]])
    torch.testing.assert_close(whole, expected[1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(start, expected[1:71], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_fresh_block_has_the_spread_asked_for_and_leaves_the_generator_alone():
    shape = tiny_model().config
    before = torch.get_rng_state()
    wide, narrow = (fresh_block(shape, std, seed=1) for std in (0.1, 0.01))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(narrow.linear.weight, wide.linear.weight / 10)
    assert wide.linear.weight.std().item() == pytest.approx(0.1, rel=0.1)
