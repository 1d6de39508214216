"""Ideas of a user, passed to `run` as classes and functions, go through the same stages as the method."""

import functools
import importlib
import json
import linecache
import pathlib
import sys
import types
from dataclasses import dataclass
from typing import Literal, Optional
from unittest.mock import Mock

import pytest
import torch
from conftest import GatedBlock, NearestTwo, in_python, local_experiment
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.hf import plugins
from ctxkv_lib.hf.export import source_file
from ctxkv_lib.method import model, oacd, phase2, scan
from ctxkv_lib.method.config import ModelConfig, Phase1Config
from ctxkv_lib.method.contexts import distinct_rows, exact_contexts
from ctxkv_lib.method.model import ContextBlock, ContextKV
from ctxkv_lib.runs import contexts, stages
from ctxkv_lib.runs.caches import load_cache
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.differences import run_names
from ctxkv_lib.runs.long_run import LongRun
from ctxkv_lib.runs.package_code import code_key
from ctxkv_lib.runs.plugins import loaded
from ctxkv_lib.runs.run_folder import RunFolder, run_folder_of
from ctxkv_lib.runs.trained import generate_text, load_model, load_trained
from ctxkv_lib.runs.work import Work


def spread(contexts):
    return contexts.square().mean() - contexts.std()


class PreviousToken(nn.Module):
    history = 1

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, embeddings, start):
        before = torch.cat([torch.zeros_like(embeddings[:, :1]), embeddings[:, :-1]], dim=1)
        return (embeddings + self.out(before))[:, start:]


IDEAS = {"block": GatedBlock, "loss": spread, "attention": NearestTwo, "mixer": PreviousToken}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    settings = {**local_experiment(tmp_path_factory.mktemp("text")), "phase1.max_iterations": 3}
    settings |= {"phase2.max_epochs": 1, "runtime.precision": "bf16"}  # in which a user's code fails first
    return build_config("ci", samples=8, settings=settings)


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory):
    """The run without any plug-in, in a folder of its own."""
    return run(config, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module", params=IDEAS)
def idea(request, config, tmp_path_factory):
    """A hook, and the run of the idea for it."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, run(config, out, **{request.param: IDEAS[request.param]})


def test_an_idea_goes_through_the_stages_and_is_named_wherever_the_run_is(idea, plain, printed_by):
    hook, made = idea
    name = f"{IDEAS[hook].__module__}:{IDEAS[hook].__name__}"
    assert made.summary["phase2"]["val_ppl"] != plain.summary["phase2"]["val_ppl"]
    stored = json.loads((made.path / "config.json").read_text())
    assert stored[hook]["plugin"] == name
    for report in ("report.md", "report.ja.md"):
        assert name in (made.path / report).read_text(encoding="utf-8")
    assert f"{hook}.plugin={name}" in printed_by("list", made.path)
    assert run_names([plain, made]) == ["no plug-in", f"{hook} {IDEAS[hook].__name__}"]
    assert IDEAS[hook].__name__ in run_folder_of(made.config).name


def test_an_idea_that_has_finished_is_reused(idea, config, monkeypatch):
    hook, made = idea
    monkeypatch.setattr(Work, "model", None)
    assert run(config, made.path, **{hook: IDEAS[hook]}).summary == made.summary


def test_all_of_a_blocks_parameters_are_trained(config, tmp_path):
    kept = {}
    for name, settings in {"trained": {}, "untrained": {"phase1.max_iterations": 0}}.items():
        out = run(config.replace(settings), tmp_path / name, block=GatedBlock).path
        kept[name] = load_file(out / "checkpoint" / "context_block.safetensors")
    for name, weight in kept["trained"].items():
        assert not torch.equal(weight, kept["untrained"][name]), name


MY_IDEAS = """
from ctxkv_lib.method.model import ContextBlock
class Mine(ContextBlock):
    def forward(self, contexts, inputs):
        return super().forward(0.9 * contexts, inputs)
"""


def test_a_saved_model_never_loads_as_another_block(config, tmp_path, monkeypatch):
    (tmp_path / "my_ideas.py").write_text(MY_IDEAS)
    monkeypatch.syspath_prepend(tmp_path)
    made = run(config, tmp_path / "run", block="my_ideas:Mine")
    trained = load_model(made.path, made.config).context_block
    served, _ = load_trained(made.path, torch.device("cpu"))
    contexts, inputs = torch.randn(3, 16), torch.randn(3, 16)
    assert torch.equal(served.context_block(contexts, inputs), trained(contexts, inputs))
    (tmp_path / "my_ideas.py").write_text(MY_IDEAS.replace("0.9", "0.81"))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "my_ideas")
    monkeypatch.setattr("ctxkv_lib.runs.plugins.digested", {})  # as in another process
    with pytest.raises(UserError, match="The source of my_ideas:Mine is not what the run was made with"):
        load_trained(made.path, torch.device("cpu"))
    again = AutoModelForCausalLM.from_pretrained(made.path / "model").context_block  # still known here
    assert torch.equal(again(contexts, inputs), trained(contexts, inputs))
    monkeypatch.setattr(plugins, "NAMED", {})
    with pytest.raises(ValueError, match="The file of my_ideas:Mine is not what the model was saved with"):
        AutoModelForCausalLM.from_pretrained(made.path / "model")


class Dropping(GatedBlock):
    def forward(self, contexts, inputs):
        return super().forward(nn.functional.dropout(contexts, 0.5, self.training), inputs)


@pytest.mark.parametrize("where", ["cached", "streamed"])
def test_contexts_are_those_of_the_block_that_is_loaded_later(config, tmp_path, where):
    """And Phase 1, where the block has dropout, does not depend on the attention that is trained later."""
    changed = config.replace({"runtime.precision": "fp32", "runtime.context_cache": where})
    made = run(changed, tmp_path / "run", block=Dropping)
    if where == "streamed":
        other = run(changed, tmp_path / "elsewhere" / "run", block=Dropping, attention=NearestTwo)
        assert [line["loss"] for line in other.phase1] == [line["loss"] for line in made.phase1]
    for split in ("train", "val"):
        cache, loaded = load_cache(made.path / "caches", split), load_model(made.path, made.config)
        embeddings, tokens = distinct_rows(loaded, cache.ids[:-1].int())
        zero = torch.zeros(cache.contexts.shape[1])
        expected, _ = exact_contexts(loaded.context_block, embeddings, tokens, 1e-5, before=zero)
        torch.testing.assert_close(cache.contexts, expected[: len(cache.contexts)], atol=1e-4, rtol=0)


class Features(NearestTwo):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("directions", torch.randn(config.hidden_size))

    def forward(self, embeddings, window, present):
        return super().forward(embeddings, window, present) * self.directions


def test_a_drawn_buffer_of_attention_is_kept(config, tmp_path):
    made = run(config, tmp_path / "run", attention=Features)
    torch.manual_seed(7)
    first, second = (load_model(made.path, made.config).attention.directions for _ in range(2))
    assert torch.equal(first, second)
    kept = load_file(made.path / "checkpoint" / "attention.safetensors")
    assert torch.equal(kept["attention.directions"], first)


def of_size(factor):
    class Scaled(GatedBlock):
        def forward(self, contexts, inputs):
            return super().forward(factor * contexts, inputs)

    return Scaled


def test_classes_of_one_function_are_plug_ins_of_their_own_and_not_saved(config, tmp_path, capsys):
    """The second takes the place of the first only if that is asked for; text comes from what was trained."""
    parts = [of_size(factor) for factor in (0.5, 0.9)]
    first, second = (config.replace({"block": part}) for part in parts)
    assert [loaded(each.plugins["block"]) for each in (first, second)] == parts
    assert run_folder_of(first) != run_folder_of(second)
    made = run(first, tmp_path / "run")
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "not saved for transformers" in line]
    assert "Scaled is defined in a notebook or a function, not in a module" in said
    assert not (made.path / "model").exists()
    assert generate_text(made, "a", max_new_tokens=1).startswith("a")
    with pytest.raises(UserError, match=r"finished result of other code, which is kept; .* --again"):
        run(second, made.path)
    assert run(second, made.path, again=True).config == second


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
def test_the_folder_of_an_idea_depends_on_its_code_and_on_what_that_uses(
    config, monkeypatch, old, new, is_same
):
    folders = []
    for number, source in enumerate((CELL, CELL.replace(old, new))):
        module = cell(source, number)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "__main__", module)
            folders.append(run_folder_of(config.replace({"block": module.Block})))
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
def test_an_idea_depends_on_the_other_files_that_it_uses(config, own_files, name):
    folders = []
    for code in (LAYERS, LAYERS.replace("tanh", "sin")):
        (own_files / "layers.py").write_text(code)
        for module in ("layers", "my_parts"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        linecache.clearcache()
        folders.append(run_folder_of(config.replace({"loss": f"my_parts:{name}"})))
    assert folders[0] != folders[1]


def test_a_class_whose_file_needs_another_file_cannot_be_exported(own_files):
    with pytest.raises(ValueError, match=r"my_parts\.py imports layers, which is no installed package"):
        source_file(importlib.import_module("my_parts").Block)


@pytest.mark.parametrize("part", [3, nn.Linear(2, 2), eval("lambda contexts: contexts.mean()")])
def test_what_is_no_class_or_function_or_has_no_source_is_refused(config, part):
    with pytest.raises(UserError, match=r"is no plug-in; give a class|to be found; define it with def"):
        config.replace({"loss": part})


def wide(contexts):
    return contexts.square()


class Narrow(nn.Module):
    def __init__(self, *shapes):
        super().__init__()

    def forward(self, first, *others):
        return first[..., 1:]


class Failing(nn.Module):
    def __init__(self, context_dim, hidden_size):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, contexts, inputs):
        return self.linear(contexts)


def constant(contexts):
    return torch.zeros(())


class Normalised(GatedBlock):
    def forward(self, contexts, inputs):
        return contexts / contexts.norm(dim=1, keepdim=True)


class BadlyMade(GatedBlock):
    def __init__(self, context_dim, hidden_size):
        super().__init__(context_dim, hidden_size)
        self.missing.weight.data.zero_()


class OwnInit(GatedBlock):
    def init_weights(self):
        self.gate.weight.data.zero_()


class Running(NearestTwo):
    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.BatchNorm1d(config.hidden_size)

    def forward(self, embeddings, window, present):
        return self.scale(super().forward(embeddings, window, present))


class Nothing(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, embeddings, window, present):
        return embeddings


class Mixed(nn.Module):
    history = 2

    def __init__(self, config):
        super().__init__()
        self.out = nn.Linear(config.hidden_size, config.hidden_size)


class Whole(Mixed):
    def forward(self, embeddings, start):
        return self.out(embeddings)


class Ahead(Mixed):
    def forward(self, embeddings, start):
        return self.out(embeddings + embeddings.mean(dim=1, keepdim=True))[:, start:]


class FarAhead(Mixed):
    def forward(self, embeddings, start):
        return self.out(embeddings.roll(-6, dims=1) if self.training else embeddings)[:, start:]


class InPlace(GatedBlock):
    def forward(self, contexts, inputs):
        return super().forward(contexts.mul_(0.5), inputs)


class Double(GatedBlock):
    def forward(self, contexts, inputs):
        return super().forward(contexts, inputs).double()


class ThreeResults(NearestTwo):
    def forward(self, embeddings, window, present):
        return super().forward(embeddings, window, present), None, None


class SlotsAhead(NearestTwo):
    @staticmethod
    def slot_offsets(config):
        return [0, -1]


@pytest.mark.parametrize(
    ("hook", "part", "said"),
    [
        ("block", Failing, r"Failing fails on 2 positions: RuntimeError: mat1 and mat2 shapes .*help\("),
        ("loss", constant, r"constant returned a scalar without a gradient; compute it from the contexts"),
        ("block", Narrow, r"Narrow returned a tensor of shape \[2, 15\]; .* a tensor of shape \[2, 16\]\."),
        ("loss", wide, r"wide returned a tensor of shape \[2, 16\]; it must return a scalar tensor\."),
        ("attention", Narrow, r"Narrow returned a tensor of shape \[2, 23\]; .* of shape \[2, 24\]\."),
        ("mixer", Whole, r"Whole returned a tensor of shape \[2, 64, 24\]; .* of shape \[2, 62, 24\]\."),
        ("mixer", FarAhead, r"The mixer reads ahead: the hidden state"),
        ("block", InPlace, r"InPlace changes what it is given in place; compute a new tensor instead\."),
        ("block", Double, r"Double returned a float64 tensor of shape \[2, 16\]; .* a tensor of shape"),
        ("attention", ThreeResults, r"ThreeResults fails on 2 positions: ValueError: too many values"),
        ("attention", SlotsAhead, r"slot_offsets are \[0, -1\]; allowed: whole numbers, ascending from 0\."),
        ("optimizer", torch.optim.SGD, r"SGD fails as an optimiser: TypeError: .*phase2\.Stepper"),
        ("mixer", Ahead, r"The mixer reads ahead: the hidden state of a column may not depend on later ones"),
        (
            "block",
            Normalised,
            r"Normalised returned NaN or infinity; the first contexts of a stream are",
        ),
        ("block", BadlyMade, r"The model cannot be built with .*BadlyMade: .* has no attribute 'missing'"),
        ("block", OwnInit, r"OwnInit fails on 2 positions: TypeError: too many positional arguments"),
        (
            "attention",
            Running,
            r"Training changes the buffer attention.scale.running_mean, which is not",
        ),
        ("attention", Nothing, r"Phase 2 has no weights to train; give attention or mixer a parameter\."),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(config, tmp_path, hook, part, said):
    with pytest.raises(UserError, match=said):
        run(config, tmp_path / "run", **{hook: part})
    assert not (tmp_path / "run").exists()


class Chosen(GatedBlock):
    @dataclass
    class Settings:
        gated: bool = True
        most: Optional[int] = 3  # noqa: UP045 (as many write it)
        kind: Literal["fast", "slow"] = "fast"
        sizes: tuple = (1, 2)

    def __init__(self, context_dim, hidden_size, settings):
        super().__init__(context_dim, hidden_size)


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [("gated", "False", False), ("gated", "true", True), ("most", "5", 5), ("most", None, None)],
)
def test_words_are_read_as_the_types_of_an_ideas_own_settings(config, name, word, value):
    chosen = config.replace({"block": Chosen, f"block.{name}": word}).plugins["block"]
    assert chosen.settings[name] is value
    assert chosen.settings["sizes"] == [1, 2]  # as in the run's config.json


class WithoutDefaults(GatedBlock):
    @dataclass
    class Settings:
        size: int


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block": Chosen, "block.gated": "0.5"}, "block.gated is '0.5'; allowed: true or false"),
        ({"block": Chosen, "block.kind": "quick"}, "block.kind is 'quick'; allowed: fast, slow"),
        ({"bloc": Chosen}, r"Did you mean block\?"),
        ({"block": WithoutDefaults}, "Settings holds no settings .*make it a dataclass whose fields have"),
        ({"block": GatedBlock(2, 3)}, "An object of type GatedBlock is no plug-in; give a class"),
    ],
)
def test_other_words_are_refused(config, settings, said):
    with pytest.raises(UserError, match=said):
        config.replace(settings)


class Remembering(GatedBlock):
    def init_weights(self, embeddings, tokens, config):
        self.scale = 3.0

    def forward(self, contexts, inputs):
        return super().forward(contexts, inputs) * getattr(self, "scale", 1.0)


class Counting(NearestTwo):
    calls = 0

    def forward(self, embeddings, window, present):
        self.calls += self.training
        return super().forward(embeddings, window, present) * (1 + (self.calls > 3))


@pytest.mark.parametrize(("hook", "part"), [("block", Remembering), ("attention", Counting)])
def test_what_is_not_saved_is_not_trained_in_silence(config, tmp_path, hook, part):
    with pytest.raises(UserError, match="computes something else than what is saved of it; keep all"):
        run(config, tmp_path / "run", **{hook: part})
    trained = [line["stage"] for line in RunFolder(tmp_path / "run").metric_lines()].count("phase2")
    assert trained == (part is Counting)


class Made(NearestTwo):
    made = 0

    def __init__(self, config):
        super().__init__(config)
        Made.made += 1


HELD = {}


def put(value):
    HELD[len(HELD)] = value
    return value


def held():
    return len(HELD)


class Caching(NearestTwo):
    def forward(self, embeddings, window, present):
        assert held() >= 0
        return put(super().forward(embeddings, window, present))


class Drawing(NearestTwo):
    def forward(self, embeddings, window, present):
        return super().forward(embeddings, window + torch.randn_like(window), present)


@pytest.mark.parametrize("part", [Made, Caching, Drawing])
def test_an_idea_may_change_what_it_reads_and_draw_when_it_is_evaluated(config, tmp_path, part):
    assert run(config, tmp_path / "run", attention=part).summary["phase2"]["val_ppl"] > 1
    HELD.clear()


class Tied(GatedBlock):
    def __init__(self, context_dim, hidden_size):
        super().__init__(context_dim, hidden_size)
        self.new.weight = self.gate.weight


class Orthogonal(GatedBlock):
    def __init__(self, context_dim, hidden_size):
        super().__init__(context_dim, hidden_size)
        nn.utils.parametrizations.orthogonal(self.gate)


class Unsaved(NearestTwo):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("two", torch.tensor(2.0), persistent=False)

    def forward(self, embeddings, window, present):
        return super().forward(embeddings, window, present) * self.two


@pytest.mark.parametrize(("hook", "part"), [("block", Tied), ("block", Orthogonal), ("attention", Unsaved)])
def test_an_idea_that_transformers_cannot_save_still_trains_and_generates(config, tmp_path, hook, part):
    made = run(config, tmp_path / "run", **{hook: part})
    assert generate_text(made, "tea", max_new_tokens=2, temperature=0).startswith("tea")


class Signs(torch.optim.Optimizer):
    def __init__(self, weights, lr):
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for weight in self.param_groups[0]["params"]:
            state = self.state[weight]
            state["count"] = state.get("count", 0) + 1
            weight -= self.defaults["lr"] / state["count"] * weight.grad.sign()


class SignSteps(phase2.Stepper):
    def __init__(self, weights, config, positions):
        self.averages = {}
        self.optimizer = Signs(weights.values(), 1e-3)


def test_an_optimiser_that_counts_by_itself_goes_on_to_the_same_numbers(
    config, tmp_path, saved_at_every_step, monkeypatch
):
    expected = run(config, tmp_path / "whole", optimizer=SignSteps).summary["phase2"]["val_ppl"]
    original, seen = LongRun.after_step, []

    def stops(self, state):
        original(self, state)
        seen.append(state)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LongRun, "after_step", stops)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run", optimizer=SignSteps)
    assert run(config, tmp_path / "run", optimizer=SignSteps).summary["phase2"]["val_ppl"] == expected


def test_which_modules_are_loaded_makes_no_other_code():
    for file in pathlib.Path(model.__file__).parent.glob("*.py"):
        importlib.import_module(f"ctxkv_lib.method.{file.stem}")
    fresh = in_python("from ctxkv_lib.runs.package_code import code_key; print(code_key())")
    assert fresh.strip() == code_key()


def without_spread(contexts, centroid_weight, scale=1.0):
    centroid = contexts.mean(dim=0)
    return scale * centroid.square().sum(), scale * 2 * centroid.expand_as(contexts) / len(contexts)


def wrapped(original, factor):
    @functools.wraps(original)
    def more(*arguments):
        return original(*arguments) * factor

    return more


PATCHES = [
    (oacd, "oacd_loss", wrapped(oacd.oacd_loss, 2)),
    (oacd, "draw_contexts", without_spread),  # defined in another module
    (model, "CONTEXT_WEIGHT_STD", 1.0),
    (scan, "AGREEMENT", 1 / 8),
    (ContextBlock, "forward", lambda self, contexts, inputs: inputs),
    (ContextBlock, "forward", lambda self, contexts, inputs: contexts),
    (ContextKV, "current_token_bias", property(lambda self: 3.0)),
    (Phase1Config, "__post_init__", lambda self: None),
]


def test_whatever_way_the_method_is_patched_it_is_other_code(monkeypatch):
    keys = [code_key()]
    for place, name, part in PATCHES:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, part)
            keys.append(code_key())
    assert len({*keys}) == len(keys)
    assert code_key() == keys[0]


@pytest.mark.slow
def test_a_finished_result_of_other_code_is_kept_unless_it_is_to_be_made_again(
    config, tmp_path, monkeypatch, capsys
):
    before = run(config, tmp_path / "run").summary
    monkeypatch.setattr(oacd, "oacd_loss", without_spread)
    with pytest.raises(UserError, match=r"finished result of other code, which is kept; .* --again"):
        run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == before
    after = run(config, tmp_path / "run", again=True).summary
    assert after["phase2"]["val_ppl"] != before["phase2"]["val_ppl"]
    elsewhere = run(config, tmp_path / "elsewhere").summary
    assert elsewhere["phase2"]["val_ppl"] == after["phase2"]["val_ppl"]


@pytest.mark.parametrize(
    "changed",
    [
        {"model.interval": 4},
        {"model.max_contexts": 3},
        {"model.attention_dropout": 0.3},
        {"model.kv_method": "variable"},
        {"phase2.learning_rate": 1e-4},
        {"attention": NearestTwo},
    ],
    ids=str,
)
def test_what_only_phase_2_depends_on_trains_no_phase_1_again(config, plain, changed, monkeypatch, capsys):
    monkeypatch.setattr(contexts, "_train_block", None)
    out = plain.path.with_name(run_folder_of(config.replace(changed)).name)
    made = run(config.replace(changed), out)
    assert "phase1 is taken from" in capsys.readouterr().err
    assert made.summary["phase1"] == plain.summary["phase1"]


def test_the_advice_when_memory_ends_keeps_phase_1(config, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_attention", Mock(side_effect=MemoryError))
        said = "Phase 2 ran out of memory .* lower phase2.batch_size, and run again: what is finished is kept"
        with pytest.raises(UserError, match=said):
            run(config, run_folder_of(config, tmp_path))
    monkeypatch.setattr(contexts, "_train_block", None)
    smaller = config.replace({"phase2.batch_size": 64})
    assert run(smaller, run_folder_of(smaller, tmp_path)).summary["phase2"]["val_ppl"] > 1
    assert "phase1 is taken from" in capsys.readouterr().err
