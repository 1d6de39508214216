import json
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from conftest import local_experiment

from ctxkv_lib.cli import main
from ctxkv_lib.research.bench import generation, measure
from ctxkv_lib.research.bench.figure import bench_figure
from ctxkv_lib.research.bench.table import bench_table

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What `ctxkv bench --json` prints for a tiny model, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("bench")
    settings = [f"--set={key}={value}" for key, value in local_experiment(folder).items()]
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(measure, "PRODUCT_SIZE", {"cpu": 64})
        patch.setattr(generation, "HISTORIES", (16, 640))
        assert main(["bench", "--preset=ci", "--samples=8", "--rounds=4", "--json", *settings]) == 0
    return json.loads(printed.getvalue()), folder


@pytest.mark.slow
def test_the_originals_loops_give_the_same_losses(measured):
    results, _ = measured
    for phase in ("phase1", "phase2"):
        assert results[phase]["original"]["loss_difference"] == 0
        assert results[phase]["fp32"]["loss_difference"] < 1e-4
    assert 0 < results["phase2"]["bf16"]["loss_difference"] < 0.05


@pytest.mark.slow
def test_ratios_and_floors_follow_from_the_times(measured):
    results, _ = measured
    for phase in ("phase1", "phase2"):
        first = results[phase]["original"]
        for name, row in results[phase].items():
            rates = {dtype: 1e9 * rate for dtype, rate in results["product_gflop_per_second"].items()}
            head = 4 * 128 * 50257 * 24 if name == "bf16" else 0  # batch, vocabulary, width
            floor = head / rates["bf16"] + (row["operations"] - head) / rates["fp32"]
            assert row["ratio"] == pytest.approx(first["seconds"] / row["seconds"])
            assert row["floor_seconds"] == pytest.approx(floor)
            assert row["floor_share"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert results["phase2"]["fp32"]["operations"] < results["phase2"]["original"]["operations"]


@pytest.mark.slow
def test_caches_hold_what_they_say(measured):
    results, _ = measured
    tokens = [row["tokens"] for row in results["scaling"]]
    assert tokens == [results["tokens"] // part for part in (64, 16, 4, 1)]
    for row in results["scaling"]:
        taken = row["streamed_us"] + row["phase2_us"]
        assert row["streamed_share"] == pytest.approx(row["streamed_us"] / taken)
    assert results["scaling"][-1]["cache_bytes"] == pytest.approx(16 * 4 + 4, rel=0.02)
    short, long = results["generation"]
    assert (short["history"], long["history"]) == (16, 640)
    assert short["ours_cache_bytes"] == long["ours_cache_bytes"]
    assert all(row[f"{name}_prefill_seconds"] > 0 for row in (short, long) for name in ("ours", "gpt2"))
    assert short["gpt2_bytes_per_position"] == long["gpt2_bytes_per_position"] == 2 * 24 * 4


@pytest.mark.slow
def test_people_get_a_table_and_a_figure(measured):
    results, folder = measured
    (out,) = (folder / "runs").glob("bench-*")
    assert json.loads((out / "bench.json").read_text()) == results
    assert (out / "bench.png").stat().st_size > 10_000
    table = bench_table(results)
    for words in (
        "original",
        "Phase 2, one step",
        "GPT-2 block, tokens a second",
        "ms to read it all",
        "computed",
    ):
        assert words in table
    assert [ax.get_title("left") for ax in bench_figure(results).axes] == [
        "Phase 1: one iteration",
        "Phase 2: one step",
        "Generation",
        "Ours on longer streams, fp32",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds=0"], "--rounds is 0; allowed: 1 or more"),
        (["--set=model.anchor=grid"], "model.anchor=current only"),
        (["--recipe=tuned"], "model.slots=uniform, model.slot_bias=none, model.output=residual, "),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, capsys):
    assert main(["bench", "--preset=ci", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_peak_memory_sees_what_was_let_go_again():
    megabyte = 2**20

    def take():
        return torch.ones(200 * megabyte // 4).sum()

    assert 150 * megabyte < measure.peak_bytes(take, CPU) < 300 * megabyte


def test_candidates_take_turns():
    calls = []
    candidates = {name: lambda n=name: calls.append(n) for name in ("a", "b")}
    times = measure.interleaved(candidates, 3, CPU, "title")
    assert calls == ["a", "b"] * (3 + measure.WARM_UP)
    assert times.keys() == {"a", "b"}


def test_operations_count_the_backward_pass_too():
    left, right = torch.randn(4, 5), torch.randn(5, 6, requires_grad=True)
    assert measure.operations(lambda: (left @ right).sum().backward()) == 2 * 2 * 4 * 5 * 6
