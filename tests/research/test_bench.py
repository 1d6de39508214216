import json
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from conftest import local_experiment, tiny_ids, tiny_model

from ctxkv_lib.cli import main
from ctxkv_lib.research import bench as module
from ctxkv_lib.research import timing
from ctxkv_lib.research.bench import TITLES, bench_figure, bench_table

CPU = torch.device("cpu")
RATES = {torch.float32: 1e9, torch.bfloat16: 4e9}  # operations a second
BATCH, VOCABULARY, WIDTH, CONTEXT, SLOTS, INNER = 128, 50257, 24, 16, 4, 32  # sizes of the tiny model


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What `ctxkv bench --json` prints for a tiny model and known rates, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("bench")
    asked = {**local_experiment(folder), "model.kv_method": "variable"}
    settings = [f"--set={key}={value}" for key, value in asked.items()]
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(module, "product_rate", lambda dtype, _: RATES[dtype])
        patch.setattr(module, "HISTORIES", (16, 640))
        assert main(["bench", "--preset=ci", "--samples=8", "--rounds=4", "--json", *settings]) == 0
    return json.loads(printed.getvalue()), folder


@pytest.mark.slow
def test_the_floor_of_a_phase_2_step_is_that_of_its_matrix_products(measured):
    """Counted by hand: backward, one product gives the gradient of weights, one that of their inputs."""
    rows = measured[0]["phase2"]
    head = 2 * 2 * BATCH * VOCABULARY * WIDTH  # the table is frozen
    query = 2 * 2 * BATCH * WIDTH * WIDTH  # embeddings are frozen
    keys_and_values = 2 * 2 * 2 * BATCH * SLOTS * CONTEXT * WIDTH  # contexts are frozen
    scores_and_mix = 2 * 3 * 2 * BATCH * SLOTS * WIDTH
    out = 3 * 2 * BATCH * WIDTH * WIDTH
    feed_forward = 2 * 3 * 2 * BATCH * WIDTH * INNER
    total = head + query + keys_and_values + scores_and_mix + out + feed_forward
    assert rows["original"]["operations"] == total
    assert rows["original"]["floor_seconds"] == pytest.approx(total / 1e9)
    ours = rows["fp32"]["operations"]
    assert head < ours < total
    assert rows["fp32"]["floor_seconds"] == pytest.approx(ours / 1e9)
    assert rows["bf16"]["floor_seconds"] == pytest.approx(head / 4e9 + (ours - head) / 1e9)


@pytest.mark.slow
def test_our_losses_are_the_references_and_numbers_of_a_row_fit_each_other(measured):
    """The reference shares no code with the package."""
    results, folder = measured
    for phase in ("phase1", "phase2"):
        assert 0 < results[phase]["fp32"]["loss_difference"] < 1e-4
    assert 0 < results["phase2"]["bf16"]["loss_difference"] < 0.05
    for rows in (results["phase1"], results["phase2"]):
        assert rows["original"]["ratio"] == 1
        for row in rows.values():
            assert row["ratio"] * row["seconds"] == pytest.approx(rows["original"]["seconds"])
            assert row["floor_share"] * row["seconds"] == pytest.approx(row["floor_seconds"])
            assert row["peak_mib"] >= 0
    assert [row["tokens"] for row in results["scaling"]] == [results["tokens"] // n for n in (64, 16, 4, 1)]
    assert results["scaling"][-1]["cache_bytes"] == pytest.approx(CONTEXT * 4 + 4, rel=0.02)
    assert all(
        row[f"{name}_us"] > 0 for row in results["scaling"] for name in ("phase1", "contexts", "phase2")
    )
    short, long = results["generation"]
    assert (short["history"], long["history"]) == (16, 640)
    assert short["ours_cache_bytes"] == long["ours_cache_bytes"]
    assert short["gpt2_bytes_per_position"] == long["gpt2_bytes_per_position"] == 2 * WIDTH * 4
    assert all(row[f"{name}_prefill_seconds"] > 0 for row in (short, long) for name in ("ours", "gpt2"))
    # People get a table and a figure.
    (out,) = (folder / "runs").glob("bench-*")
    assert json.loads((out / "bench.json").read_text()) == results
    assert (out / "bench.png").stat().st_size > 10_000
    table = bench_table(results)
    for text in ("original", "Phase 2, one step", "floor_share", "gpt2_tokens_per_second", "phase1_us"):
        assert text in table
    titles = [ax.get_title("left") for ax in bench_figure(results).axes]
    assert titles == [TITLES[part] for part in ("phase1", "phase2", "generation", "scaling")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds=0"], "--rounds is 0; allowed: 1 or more"),
        (["--set=model.anchor=grid"], "The original has model.anchor=current only"),
        (
            ["--set=data.unigram=corpus"],
            "The original has data.unigram=none only; give bench the same with --set",
        ),
        (["--recipe=tuned"], "has no plug-in as block or attention or optimizer; bench measures"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, said, printed_by):
    assert said in printed_by("bench", "--preset=ci", *arguments, code=2)


def test_results_that_have_no_place_are_refused_before_anything_is_measured(
    printed_by, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "prepare", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").touch()
    assert "file cannot be made" in printed_by("bench", "--preset=ci", f"--out={tmp_path / 'file'}", code=2)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not reset a process's peak")
def test_peak_memory_sees_what_was_let_go_again():
    assert 150 < timing.peak_mib(lambda: torch.ones(200 * 2**20 // 4).sum(), CPU) < 300


def test_each_round_of_generation_begins_with_the_same_history():
    block = module._gpt2_block(tiny_model())
    cache = module._read(block, tiny_ids(30)[None])
    for _ in range(2):
        module._read_on(block, cache, 20)
        assert cache.get_seq_length() == 20 + module.TOKENS_A_ROUND


def test_candidates_take_turns_after_a_warm_up():
    calls = []
    candidates = {name: lambda n=name: calls.append(n) for name in ("a", "b")}
    times = timing.interleaved(candidates, 3, CPU, "title")
    assert calls == ["a", "b"] * (3 + timing.WARM_UP)
    assert times.keys() == {"a", "b"}
