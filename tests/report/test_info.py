import subprocess
import sys

import pytest
import torch
from conftest import TINY

from ctxkv_lib.config import build_config
from ctxkv_lib.model.config import ModelConfig
from ctxkv_lib.model.context_cache import ContextCache
from ctxkv_lib.model.modeling import ContextKVConfig, ContextKVForCausalLM, parameter_counts
from ctxkv_lib.report.info import describe


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
