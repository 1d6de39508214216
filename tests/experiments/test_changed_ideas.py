"""An idea that has changed, or what it uses, is another experiment; other words about the code are not."""

import importlib
import linecache
import sys
import types

import pytest

from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.run_folder import run_folder_of


def cell(source, number):
    """Define what a notebook cell does, the way IPython does it."""
    file = f"/tmp/ipykernel_1/{number}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = types.ModuleType("__main__")
    exec(compile(source, file, "exec"), vars(module))
    return module


CELL = """
from collections import namedtuple
from functools import cache, partial
from operator import add, mul
import torch
import torch.nn.functional as F
from torch import nn
Pair = namedtuple('Pair', 'first second')
PAIR = Pair((1, 2), {'first': F.gelu})
MORE = 1
SEEN = []
STARTED = 1
class Odd:
    def __getattr__(self, name):
        return self
ODD = Odd()
WEIGHT = 2.0
SETTINGS = {'scale': 1.0, 'parts': [torch.tensor([1.0, 1.0])]}
times = partial(mul, 3)
@cache
def scale():
    return SETTINGS['scale']
def helper(values):
    return values.tanh()
class Block(nn.Module):
    '''A block.'''
    def __init__(self, context_dim, hidden_size):
        super().__init__()
        self.new = nn.Linear(hidden_size, context_dim)
    def forward(self, contexts, inputs):
        global STARTED
        STARTED += 1
        SEEN.append(len(PAIR) + (ODD is None))
        helper_of = helper
        return times(scale() * helper_of(contexts + WEIGHT * self.new(inputs)))  # bounded
"""


@pytest.mark.parametrize(
    ("old", "new", "is_same"),
    [
        ("# bounded", "# in (-1, 1)", True),
        ("'''A block.'''", "'''My block.'''", True),
        ("contexts + WEIGHT", "contexts - WEIGHT", False),
        ("values.tanh()", "values.sin()", False),
        ("WEIGHT = 2.0", "WEIGHT = 3.0", False),
        ("'scale': 1.0", "'scale': 0.5", False),
        ("tensor([1.0", "tensor([2.0", False),
        ("mul, 3", "mul, 4", False),
        ("mul, 3", "add, 3", False),
        ("(1, 2)", "(1, 3)", False),
        ("'first': F.gelu", "'first': F.relu", False),
        ("MORE = 1", "MORE = 2", True),
        ("SEEN = []", "SEEN = [1.0]", True),
        ("STARTED = 1", "STARTED = 2", True),
    ],
)
def test_the_folder_of_an_idea_depends_on_its_code_and_on_what_that_uses(monkeypatch, old, new, is_same):
    folders = []
    for number, source in enumerate((CELL, CELL.replace(old, new))):
        module = cell(source, number)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "__main__", module)
            folders.append(run_folder_of(build_config("ci").replace({"block": module.Block})))
    assert (folders[0] == folders[1]) == is_same


LAYERS = """
def squash(values):
    return values.tanh()
"""
USER = """
import layers
from layers import squash
from torch import nn
def direct(contexts):
    return squash(contexts).mean()
def by_module(contexts):
    return layers.squash(contexts).mean()
class Block(nn.Module):
    def __init__(self, context_dim, hidden_size):
        super().__init__()
        self.new = nn.Linear(hidden_size, context_dim)
    def forward(self, contexts, inputs):
        return squash(contexts + self.new(inputs))
"""


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """Two files of the user, the second of which uses the first; both are forgotten at the end."""
    (tmp_path / "layers.py").write_text(LAYERS)
    (tmp_path / "my_parts.py").write_text(USER)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("layers", "my_parts"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["direct", "by_module"])
def test_an_idea_depends_on_the_other_files_that_it_uses(own_files, name):
    folders = []
    for code in (LAYERS, LAYERS.replace("tanh", "sin")):
        (own_files / "layers.py").write_text(code)
        for module in ("layers", "my_parts"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        linecache.clearcache()
        folders.append(run_folder_of(build_config("ci").replace({"loss": f"my_parts:{name}"})))
    assert folders[0] != folders[1]
