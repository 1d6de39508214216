"""The digest of a plug-in changes if its results can change, and stays the same if they cannot."""

import functools
import importlib
import sys
import types

import pytest

from ctxkv_lib.method.oacd import oacd_loss
from ctxkv_lib.plugins.code_digest import code_digest
from ctxkv_lib.plugins.plugins import PlugIn
from ctxkv_lib.runs.folders import run_folder_of
from ctxkv_lib.runs.presets import build_config

COMMON = """
import enum, functools
import torch
from torch import nn

def wrapped(inner, factor):
    @functools.wraps(inner)
    def more(c):
        return inner(c) * factor
    return more

def plain(c):
    return c.mean()

def double(self, c):
    return 2 * c

class Base(nn.Module):
    def forward(self, c):
        return c
"""


def run_cell(source):
    """Run code as a notebook cell in a new session, and return the session's module."""
    module = types.ModuleType("__main__")
    exec(compile(source, "<cell>", "exec"), vars(module))
    return module


def digest(module, name="idea"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", module)
        return code_digest(getattr(module, name))


CELL = """
from collections import namedtuple
from functools import cache, partial
from operator import add, mul
import torch.nn.functional as F
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
class idea(nn.Module):
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
FACTORY = """
def make(K, base=Base):
    class C(base):
        k = K
        def forward(self, c):
            return self.k * c
    return C
"""
MODULE = """
class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
torch.manual_seed(1)
HEAD = Head().to(torch.bfloat16)
def idea(c):
    return HEAD.linear(c).mean()
"""
OBJECT = """
class Limits:
    def __init__(self, low):
        self.low, self.calls, self.parts = low, 0, [plain]
        self.same = self
    def clip(self, c):
        self.calls += 1
        return c.clamp(self.low)
LIMITS = Limits(1)
def idea(c):
    return LIMITS.clip(c)
"""


@pytest.mark.parametrize(
    ("source", "old", "new"),
    [
        ("def make(w):\n    def f(c, w=w):\n        return c\n    return f\nidea = make(1)", "(1)", "(2)"),
        ("def make(w):\n    def f(c, *, w=w):\n        return c\n    return f\nidea = make(1)", "(1)", "(2)"),
        ("two = lambda c: c + 1, lambda c: c - 1\nidea = two[0]", "[0]", "[1]"),
        ("K = 1; idea = lambda c: c * K", "K = 1", "K = 2"),
        ("idea = lambda c: c.clamp(min=0)", "min", "max"),
        (FACTORY + "idea = make(1)", "make(1)", "make(2)"),
        (FACTORY + "idea = make(1)", "make(1)", "make(1, nn.Module)"),
        (FACTORY + "idea = make(1); idea.forward = double", "2 * c", "3 * c"),
        (FACTORY + "idea = make(1); idea.__call__ = double", "2 * c", "3 * c"),
        ("idea = wrapped(plain, 1)", "1", "2"),
        ("idea = wrapped(plain, 1)", "mean()", "sum()"),
        ("idea = torch.no_grad()(plain)", "mean()", "sum()"),
        ("TABLE = {'f': plain}\ndef idea(c):\n    return TABLE['f'](c)", "mean()", "sum()"),
        (MODULE, "seed(1)", "seed(2)"),
        (OBJECT, "Limits(1)", "Limits(2)"),
        (OBJECT, "clamp", "clip"),
        ("class idea(Base):\n    pass", "    return c\n", "    return -c\n"),
        ("def idea(c):\n    return KIND.B.value * c\nclass KIND(enum.Enum):\n    B = 1", "B = 1", "B = 2"),
        (CELL, "values.tanh()", "values.sin()"),
        (CELL, "'scale': 1.0", "'scale': 0.5"),
        ("class Rate(float):\n    pass\nRATE = Rate(0.1)\ndef idea(c):\n    return c * RATE", "0.1", "0.2"),
        ("class S:\n    __slots__ = 'v'\nS = S()\nS.v = 1\ndef idea(c):\n    return S.v", "v = 1", "v = 2"),
        (CELL, "mul, 3", "mul, 4"),
        (CELL, "mul, 3", "add, 3"),
        (CELL, "(1, 2)", "(1, 3)"),
        (CELL, "'first': F.gelu", "'first': F.relu"),
        ("T = torch.ones(2, 3)\ndef idea(c):\n    return T @ c", "2, 3", "3, 2"),
        ("T = torch.eye(2)[:, 0]\ndef idea(c):\n    return T + c", "0]", "1]"),
        ("T = torch.eye(2).to_sparse()\ndef idea(c):\n    return T + c", "eye(2)", "ones(2, 2)"),
    ],
)
def test_code_that_computes_something_else_is_a_different_idea(source, old, new):
    before, found, after = (COMMON + source).rpartition(old)
    assert found
    codes = (COMMON + source, COMMON + source, before + new + after)
    first, same, other = (digest(run_cell(code)) for code in codes)
    assert first == same != other


def test_comments_docstrings_and_unused_names_do_not_change_an_idea():
    changed = CELL.replace("# bounded", "# in (-1, 1)").replace("'''A block.'''", "'''My block.'''")
    assert digest(run_cell(COMMON + CELL)) == digest(run_cell(COMMON + changed.replace("MORE = 1", "")))


def test_the_order_of_a_set_does_not_change_an_idea():
    codes = (f"{made}\ndef idea(c):\n    return len(ON)" for made in ("ON = {0, 8}", "ON = {8}; ON.add(0)"))
    assert len({digest(run_cell(COMMON + code)) for code in codes}) == 1


@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("@functools.cache\ndef two():\n    return 2\ndef idea(c):\n    return two() * c", "idea(1)"),
        ("class idea(torch.autograd.Function):\n    pass", "idea.apply"),
        ("LIST = []\nLIST.append(LIST)\ndef idea(c):\n    return LIST[0]", "idea(1)"),
    ],
)
def test_using_an_idea_does_not_change_it(source, use):
    session = run_cell(COMMON + source)
    before = digest(session)
    exec(use, vars(session))
    assert digest(session) == before


def test_a_wrapper_of_a_function_of_the_package_is_the_users_idea():
    @functools.wraps(oacd_loss)
    def more(*arguments):
        return 2 * oacd_loss(*arguments)

    assert PlugIn.of(oacd_loss).code == ""
    assert PlugIn.of(more).code != ""


def test_the_contents_of_an_installed_module_do_not_change_an_idea(monkeypatch):
    session = run_cell(
        COMMON + "def idea(c):\n    module = nn\n    import torch.nn as inner\n    return module, inner"
    )
    before = digest(session)
    monkeypatch.setattr("torch.nn.extra", 1, raising=False)
    assert digest(session) == before


def test_two_imports_of_one_name_are_both_part_of_an_idea(own_module):
    two = "class idea:\n" + "".join(
        f"    def {name}(self, c):\n        from {name} import helper\n        return helper(c)\n"
        for name in ("first_part", "second_part")
    )
    found = set()
    for first, second in ((1, 1), (2, 1), (1, 2)):
        for name, factor in (("first_part", first), ("second_part", second)):
            own_module(name, f"def helper(c):\n    return {factor} * c\n")
        found.add(code_digest(importlib.import_module(own_module("two_imports", two)).idea))
    assert len(found) == 3


LAYERS = """
def squash(values):
    return values.tanh()
"""
USER = """
import layers
from layers import squash
def direct(contexts):
    return squash(contexts).mean()
def by_module(contexts):
    return layers.squash(contexts).mean()
def imported_within(contexts):
    from layers import squash as within
    return within(contexts).mean()
def by_a_text(contexts):
    return getattr(layers, "squash")(contexts).mean()
"""


@pytest.mark.parametrize("name", ["direct", "by_module", "imported_within", "by_a_text"])
@pytest.mark.parametrize("file", ["layers", "wave"])  # the standard library has a module wave
def test_the_folder_of_a_run_depends_on_the_other_files_that_an_idea_uses(own_module, name, file):
    folders = []
    more = "def other():\n    pass\n"
    for code in (LAYERS, LAYERS + "# a comment\n", LAYERS.replace("tanh", "sin"), LAYERS + more):
        own_module(file, code)
        own_module("my_parts", USER.replace("layers", file))
        folders.append(run_folder_of(build_config("ci", loss=f"my_parts:{name}")))
    assert folders[0] == folders[1] == folders[3] != folders[2]
