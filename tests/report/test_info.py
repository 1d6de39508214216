import pytest
import torch

from ctxkv_lib.hf.cache import ContextCache
from ctxkv_lib.report.info import describe
from ctxkv_lib.report.terminal import format_info
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.models import shapes


@pytest.mark.parametrize(
    ("recipe", "settings", "slots"),
    [
        ("exact", {}, "32 contexts, 20 tokens apart: 640 tokens"),
        ("exact", {"model.interval": 1}, "32 contexts, 0 to 31 tokens back"),
        ("exact", {"model.max_contexts": 1}, "1 context, 0 tokens back"),
        ("tuned", {}, "32 contexts, 0 to 620 tokens back"),
    ],
)
def test_info_says_where_slots_lie_and_how_large_the_cache_is(recipe, settings, slots):
    config = build_config("ci", recipe, settings=settings)
    window, copies = shapes(config)[1:]
    cache = ContextCache(window, config.model.context_dim, 1, torch.zeros(1), copies)
    assert copies == (recipe == "tuned")
    sizes = describe(config)
    assert sizes["kv_cache"] == {"contexts": cache.stored.shape[1] + 1, "bytes": cache.nbytes}
    assert sizes["slots"] == slots


def test_a_mixer_has_no_contexts_to_describe():
    config = build_config("offline", settings={"mixer": "own_parts:GRUMixer"})
    sizes = describe(config, 90_000, 9_000)
    assert sizes["slots"] is sizes["kv_cache"] is sizes["context_window"] is sizes["computed"] is None
    shown = format_info(sizes)
    assert f"{sizes['parameters']['trainable_phase2']:,}" in shown
    assert "context" not in shown.lower()


@pytest.mark.parametrize(
    ("settings", "tokens", "refused"),
    [
        ({}, (587_970, 22_723), None),
        ({"data.samples": 300_000}, (), "data.samples is 300000, but UltraChat has only 201865"),
        ({"data.test_samples": 501}, (), "data.test_samples is 501, but UltraChat has only 500"),
        ({"data.corpus_samples": 5001}, (), None),  # which is not read
        ({"model.hidden_size": 96}, (), "model.hidden_size is 96, allowed with data.table=gpt2: 768"),
        ({}, (587_970, 640), "The val stream has 640 tokens, no more than one context window (640)"),
        ({"runtime.device": "mps"}, (), "runtime.device is 'mps', which this machine lacks"),
        (
            {"runtime.device": "cpu", "runtime.cuda_graph": "on"},
            (),
            "cuda_graph is 'on', but the device is cpu",
        ),
    ],
)
def test_info_warns_of_what_run_refuses(settings, tokens, refused):
    sizes = describe(build_config("colab", settings=settings), *tokens)
    assert [refused in sentence for sentence in sizes["refused"]] == ([True] if refused else [])
    assert ("`ctxkv run` would refuse this: " in format_info(sizes)) == bool(refused)


def test_the_size_of_large_runs_is_computed():
    sizes = {
        samples: describe(build_config("colab", "exact", samples))["computed"]
        for samples in (500, 10_000, 200_000)
    }
    assert "colab, published, 10,000" in format_info(describe(build_config("colab", samples=10_000)))
    assert [size["tokens"] for size in sizes.values()] == [587_970, 11_759_400, 235_188_000]
    assert [size["is_streamed"] for size in sizes.values()] == [False, True, True]
    assert sizes[200_000]["pool_gib"] == sizes[10_000]["pool_gib"] == 0.25
    assert sizes[200_000]["disk_gib"] < 3
    held, weights = 587_970 * (2 + 2 * 256 + 4), 4 * (45_163_264 + 6_301_440)
    assert sizes[500]["disk_gib"] == pytest.approx((held + weights) / 2**30)
    assert sizes[200_000]["phase1_gib"] == sizes[10_000]["phase1_gib"] > sizes[500]["phase1_gib"]
    assert sizes[500]["sent_mib"] == pytest.approx(6_301_440 * 4 / 2**20)
    few = sizes[500]["epoch_seconds"]
    assert few["L4"] == pytest.approx(587_970 * (4 * 50_257 * 768 + 6 * 6_301_440) / (121e12 * 0.4))
    assert few["8 x H100"] == few["H100"] == 1149 * 2e-3  # a step's launches
    published = describe(build_config("colab", samples=200_000))["computed"]
    assert published["pool_gib"] == pytest.approx(235_188_000 * 1024 / 2**30)  # in fp32
    assert published["epoch_seconds"]["L4"] == pytest.approx(
        sizes[200_000]["epoch_seconds"]["L4"] * 121 / 30.3
    )
    assert describe(build_config("offline"))["computed"] is None
