"""The Python code in the README does what the README says."""

import re
from importlib import import_module

import torch
from conftest import TOP, cloned

from ctxkv_lib.method import reference
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.model import ContextKV

METHOD, IDEA = re.findall(r"(?s)```python\n(.*?)```", (TOP / "README.md").read_text(encoding="utf-8"))


def test_the_readmes_code_of_the_method_computes_what_the_package_computes():
    code = {}
    exec(METHOD, code)
    torch.manual_seed(0)
    model, ids = ContextKV(ModelConfig(), 50), torch.randint(50, (700,))
    table = model.wte.weight.detach()
    weights = cloned(model)
    x, contexts = reference.normed_embedding(table, ids), torch.randn(700, 256)
    torch.testing.assert_close(
        code["next_context"](model.context_block, contexts, x), reference.context_block(weights, contexts, x)
    )
    torch.testing.assert_close(code["oacd"](contexts), reference.dispersion_loss(contexts, 0.1))
    positions = torch.tensor([0, 19, 20, 350, 699])
    expected = reference.phase2_logits(weights, table, ids, contexts, positions, ModelConfig())
    for position, logits in zip(positions.tolist(), expected, strict=True):
        made = code["logits"](model, x, contexts, position)
        torch.testing.assert_close(made, logits, rtol=1e-4, atol=1e-4)


def test_the_readmes_own_idea_trains(tmp_path, monkeypatch, own_module):
    monkeypatch.chdir(tmp_path)
    small = IDEA.replace('"offline", samples=10', '"ci", samples=2, settings={"phase2.max_epochs": 1}')
    run = import_module(own_module("readme_idea", small)).run
    assert run.config.plugins["loss"].name == "readme_idea:spread"
    assert run.path.is_relative_to("runs")
    assert run.summary["phase2"]["val_ppl"] > 1
