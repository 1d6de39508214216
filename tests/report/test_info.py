import subprocess
import sys

import pytest
import torch
from conftest import TINY

from ctxkv_lib.hf.cache import ContextCache
from ctxkv_lib.hf.modeling import ContextKVConfig, ContextKVForCausalLM, parameter_counts
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.report.info import describe
from ctxkv_lib.runs.config import build_config


@pytest.mark.parametrize("anchor", ["current", "grid"])
@pytest.mark.parametrize("shapes", [{}, TINY])
def test_counts_from_shapes_are_those_of_the_real_model(shapes, anchor):
    shapes = {**shapes, "anchor": anchor}
    with torch.device("meta"):
        model = ContextKVForCausalLM(ContextKVConfig(**shapes))
    facts = describe(
        build_config("ci").replace({f"model.{k}": v for k, v in ModelConfig(**shapes).__dict__.items()})
    )
    cache = ContextCache(model.config, 1, model.wte.weight)
    assert facts["parameters"] == parameter_counts(model)
    assert facts["kv_cache"] == {"contexts": cache.stored.shape[1] + 1, "bytes": cache.nbytes}


def test_info_loads_nothing_heavy():
    """What makes it answer in a fraction of a second."""
    code = "import sys; from ctxkv_lib.cli import main; main(['info']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "45,163,264" in done.stdout
    assert not {"torch", "transformers", "numpy", "matplotlib"} & set(done.stdout.split())


def test_the_size_of_large_runs_is_computed():
    sizes = {
        samples: describe(build_config("colab", "exact", samples))["computed"]
        for samples in (500, 10_000, 200_000)
    }
    assert [size["tokens"] for size in sizes.values()] == [587_970, 11_759_400, 235_188_000]
    assert [size["is_streamed"] for size in sizes.values()] == [False, True, True]
    assert sizes[200_000]["pool_gib"] == sizes[10_000]["pool_gib"] == 0.25
    assert sizes[200_000]["disk_gib"] < 3
    assert sizes[500]["sent_mib"] == pytest.approx(6_301_440 * 4 / 2**20)
    few = sizes[500]["epoch_seconds"]
    assert few["L4"] == pytest.approx(587_970 * (4 * 50_257 * 768 + 6 * 6_301_440) / (121e12 * 0.4))
    assert few["8 x H100"] == few["H100"] == 1149 * 2e-3  # a step's launches
    published = describe(build_config("colab", samples=200_000))["computed"]
    assert published["pool_gib"] == pytest.approx(235_188_000 * 512 / 2**30)
    assert describe(build_config("offline"))["computed"] is None
