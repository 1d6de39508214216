"""A run keeps the file or the notebook cell that defines an idea, if it can be found."""

import importlib
import linecache
import sys
import types
from functools import partial

import pytest

from ctxkv_lib.method.oacd import oacd_loss
from ctxkv_lib.plugins.plugins import PlugIn
from ctxkv_lib.plugins.source_text import source_text

SOURCE = """
import torch
SIZE = 2
class Idea(torch.nn.Module):
    options = {}
    def __init__(self, context_dim, hidden_size):
        super().__init__()
    @torch.no_grad()
    def init_weights(self, embeddings, tokens, config):
        pass
    def forward(self, contexts, inputs):
        return SIZE * contexts
def loss(contexts, power=2):
    return (contexts**power).mean()
class Power:
    def __call__(self, contexts):
        return contexts.mean()
"""
PARTS = {
    "Idea": lambda module: module.Idea,
    "loss": lambda module: module.loss,
    "loss(...)": lambda module: partial(module.loss, power=3),
    "Power(...)": lambda module: module.Power(),
    "Power.__call__(...)": lambda module: module.Power().__call__,
}


@pytest.mark.parametrize(("name", "part"), PARTS.items(), ids=PARTS)
def test_the_whole_file_is_kept_unless_it_was_edited_since(own_module, tmp_path, name, part):
    module = importlib.import_module(own_module("my_ideas", SOURCE))
    plugin = PlugIn.of(part(module), "block" if name == "Idea" else "loss")
    assert source_text(plugin) == f"# my_ideas.py, which defines my_ideas:{name}\n{SOURCE}"
    for edited in (SOURCE.replace("mean()", "sum()").replace("SIZE *", "3 *"), "class Idea(", ""):
        (tmp_path / "my_ideas.py").write_text(edited)
        assert source_text(plugin) == ""


def test_the_whole_notebook_cell_is_kept(monkeypatch):
    session = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", session)
    monkeypatch.setitem(
        linecache.cache, "cell", (len(SOURCE), None, SOURCE.splitlines(keepends=True), "cell")
    )
    exec(compile(SOURCE, "cell", "exec"), vars(session))
    plugin = PlugIn.of(session.Idea)
    assert source_text(plugin) == f"# notebook cell, which defines __main__:Idea\n{SOURCE}"


def test_without_a_source_nothing_is_kept():
    typed = {}
    exec("def loss(contexts):\n    return contexts.mean()", typed)
    parts = (typed["loss"], partial(oacd_loss, centroid_weight=1.0), "torch:sum")
    assert [source_text(PlugIn.of(part, "loss")) for part in parts] == [""] * 3
