"""An idea that would silently give wrong results is refused before anything is trained."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from conftest import GatedBlock, NearestTwo, PreviousToken, tiny_run
from torch import nn

from ctxkv_lib.cli import main
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import compare, prepare, run
from ctxkv_lib.method.oacd import oacd_loss


def giving(kind, change):
    """Return a subclass of `kind` whose forward pass returns `change(output, *inputs)`."""

    class Other(kind):
        def forward(self, *inputs):
            return change(super().forward(*inputs), *inputs)

    return Other


NARROW = giving(GatedBlock, lambda found, *_: found[:, 1:])
DOUBLE = giving(GatedBlock, lambda found, *_: found.double())
NORMALISED = giving(GatedBlock, lambda _, contexts, __: contexts / contexts.norm(dim=1, keepdim=True))
MIXING = giving(NearestTwo, lambda found, _, window, __: found + window.mean())
WITHOUT_HEADS = giving(NearestTwo, lambda found, _, __, present: (found, present.float()))
AHEAD = giving(PreviousToken, lambda _, embeddings, start: embeddings.roll(-6, dims=1)[:, start:])


class Standardised(GatedBlock):
    def __init__(self, context_dim, hidden_size):
        super().__init__(context_dim, hidden_size)
        self.norm = nn.BatchNorm1d(context_dim)  # mixes rows, but only in training


class WithoutTheNearest(NearestTwo):
    def forward(self, embeddings, window, present):
        scores = window.sum(dim=-1).masked_fill(~present, -math.inf)[:, 1:]
        return embeddings + self.out(torch.einsum("ns,nsd->nd", scores.softmax(dim=-1), window[:, 1:]))


def with_slots(*offsets):
    class Slots(NearestTwo):
        @staticmethod
        def slot_offsets(config):
            return [*offsets]

    return Slots


class AlongRows(PreviousToken):
    def __init__(self, config):
        super().__init__(config)
        self.out = nn.GRU(config.hidden_size, config.hidden_size)

    def forward(self, embeddings, start):
        return self.out(embeddings)[0][:, start:]


class Listed(GatedBlock):
    def __init__(self, context_dim, hidden_size):
        super().__init__(context_dim, hidden_size)
        self.more = {"two": [nn.Linear(context_dim, context_dim)]}


class Plain(NearestTwo):
    def __init__(self, config):
        super().__init__(config)
        self.directions = torch.randn(config.hidden_size)


NOISY = giving(GatedBlock, lambda found, *_: found + torch.randn_like(found))
DRAWING = giving(NearestTwo, lambda found, *_: found + torch.randn_like(found))


class Empty(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, embeddings, window, present):
        return embeddings


class Forgotten(PreviousToken):
    reads = "contexts"


class Misread(PreviousToken):
    reads = "token"


class InitsItself(NearestTwo):
    def init_weights(self):
        pass


class Shadowed(NearestTwo):
    def __init__(self, config):
        super().__init__(config)
        self.history = nn.Linear(1, 1)


def makes_tokens(config):
    return PreviousToken(config)


def of_each(contexts):
    return contexts.square().mean(dim=1)


def detached(contexts):
    return contexts.detach().square().mean()


def misnamed(contexts, embedding):
    return (contexts.mean() - embedding.mean()).square()


class Blind(nn.Module):
    """A loss that has weights but ignores the contexts, so that no gradient reaches them."""

    def __init__(self, context_dim, hidden_size):
        super().__init__()
        self.read = nn.Linear(context_dim, hidden_size)

    def forward(self, previous, embeddings):
        return (self.read(previous) - embeddings).square().mean()


class ListedWeights(Blind):
    def __init__(self, context_dim, hidden_size):
        super().__init__(context_dim, hidden_size)
        self.more = [nn.Linear(context_dim, hidden_size)]


@pytest.mark.parametrize(
    ("hook", "part", "said"),
    [
        ("block", NARROW, r"Other returned float32 of shape \[2, 15\]; it must .* of shape \[2, 16\]\."),
        ("block", DOUBLE, r"Other returned float64 of shape \[2, 16\]; it must return float32"),
        ("block", NORMALISED, r"Other returned NaN or infinity; the first contexts of a stream are"),
        ("block", Standardised, r"What .*Standardised returns in a row depends on other rows"),
        ("layer", MIXING, r"What .*Other returns in a row depends on other rows"),
        ("layer", WithoutTheNearest, r"WithoutTheNearest returned NaN .* only slot 0 is present"),
        ("layer", WITHOUT_HEADS, r"Other returned weights of shape \[2, 2\]; allowed: \[n, heads"),
        ("layer", with_slots(0, -1), r"slot_offsets of .* are \[0, -1\]; allowed: whole numbers, asc"),
        ("layer", with_slots(0, 1.5), r"slot_offsets of .* are \[0, 1\.5\]"),
        ("layer", AHEAD, r"Other reads ahead: the hidden state of a column may not depend on later columns"),
        ("layer", AlongRows, r"What .*AlongRows returns in a row depends on other rows .*batch_first=True"),
        ("block", Listed, r"Listed keeps modules or tensors in the plain attribute more, .*nn\.ModuleList"),
        ("layer", Plain, r"Plain keeps modules or tensors in the plain attribute directions, .*register_buf"),
        ("block", NOISY, r"Other returned something else in evaluation when it was called again"),
        ("layer", DRAWING, r"Other returned something else in evaluation .*only if self\.training"),
        ("layer", Empty, r"Empty has no parameters, so Phase 2 has nothing to train"),
        (
            "layer",
            Forgotten,
            r"forward of .*Forgotten cannot be called .*; write reads = \"tokens\" in the cl",
        ),
        ("layer", Misread, r"Misread has reads = 'token'; allowed: 'contexts' or 'tokens'"),
        ("layer", InitsItself, r"init_weights of .*InitsItself cannot be called with \(embeddings, tokens,"),
        ("layer", Shadowed, r"Shadowed has a weight or module named history, which means something else"),
        ("layer", makes_tokens, r"makes_tokens makes a layer that reads tokens; give its class"),
        ("loss", NearestTwo, r"NearestTwo is not a loss: a loss is a function, or an nn\.Module class, that"),
        ("loss", GatedBlock, r"GatedBlock takes \(contexts, inputs\), but a loss is given contexts, prev"),
        ("loss", misnamed, r"misnamed takes \(contexts, embedding\), but a loss is given .* give the others"),
        ("loss", nn.Identity(), r"An object of type Identity is not a plug-in; give a class or a funct"),
        ("layer", GatedBlock, r"GatedBlock is not a layer: a layer is a class or function that is called"),
        ("loss", of_each, r"of_each returned float32 of shape \[\d+\]; a loss must return a finite scalar"),
        ("loss", detached, "detached returned a number without a gradient, so that it trains nothing; comp"),
        ("loss", Blind, "Blind returned a number without a gradient, so that it trains nothing; compute it"),
        ("loss", ListedWeights, "ListedWeights keeps modules or tensors in the plain attribute more, which"),
    ],
)
def test_an_idea_that_would_be_silently_wrong_is_refused(tiny_config, tmp_path, hook, part, said):
    with pytest.raises(UserError, match=said):
        run(tiny_config, tmp_path / "run", **{hook: part})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("start", [run, prepare, lambda preset: compare([preset, preset])])
def test_the_name_of_a_preset_is_refused_as_a_configuration(start):
    with pytest.raises(
        UserError, match=r"str is not a configuration; make one with ctxkv\.build_config\('ci'\)\."
    ):
        start("ci")


def in_place(contexts):
    contexts -= contexts.mean(dim=0)
    return oacd_loss(contexts, 0.1) + contexts.square().mean()


def test_a_loss_may_work_in_place_and_is_refused_if_phase_1_trains_nothing(tiny_config, tmp_path):
    assert prepare(tiny_config, tmp_path / "run", loss=in_place).run.summary["phase1"]["iterations"] > 1
    untrained = tiny_config.replace({"phase1.max_iterations": 0})
    with pytest.raises(UserError, match=r"trains nothing here, so .*in_place has no effect"):
        prepare(untrained, tmp_path / "untrained", loss=in_place)


def divided(contexts):
    return contexts.mean() * (1 // 0)


def test_an_arithmetic_error_in_a_users_loss_keeps_its_traceback(tiny_config, tmp_path):
    with pytest.raises(ZeroDivisionError) as raised:
        run(tiny_config, tmp_path / "run", loss=divided)
    assert raised.traceback[-1].name == "divided"
    assert "contexts" in raised.traceback[-1].locals  # `%debug` still shows the variables


@pytest.mark.parametrize(
    ("source", "is_noted"),
    [("def read(contexts):\n    open('missing.txt')\n", True), ("read = open('missing.txt')\n", False)],
    ids=["in the loss", "in its module"],
)
def test_a_system_error_in_a_users_file_keeps_its_traceback_on_the_command_line(
    own_module, tiny_settings, tmp_path, source, is_noted
):
    loss = f"{own_module('my_losses', source)}:read"
    with pytest.raises(FileNotFoundError, match=r"missing\.txt") as raised:
        main([*tiny_run(tmp_path / "run", tiny_settings), "--loss", loss])
    note = f"This error comes from your own code in {tmp_path / 'my_losses.py'}."
    assert getattr(raised.value, "__notes__", []) == [note] * is_noted


class Spiking(GatedBlock):
    def forward(self, contexts, inputs):
        is_one_word = inputs[:, 3:4] > 2
        return super().forward(contexts, inputs).masked_fill(is_one_word, torch.inf)


@pytest.mark.parametrize("method", ["exact", "passes"])
def test_contexts_that_overflow_are_refused_with_what_to_change(tiny_config, tmp_path, method):
    untrained = {"phase1.context_method": method, "phase1.max_iterations": 0}
    with pytest.raises(UserError, match="The contexts overflow; bound what the block returns"):
        prepare(tiny_config.replace(untrained), tmp_path / "run", block=Spiking)


class Chosen(GatedBlock):
    @dataclass
    class Settings:
        gated: bool = True
        most: int | None = 3
        rate: float = 0.5
        sizes: tuple = (1, 2)
        parts: list[int] = field(default_factory=lambda: [4])
        name: str = "a"
        options: dict = field(default_factory=dict)

    def __init__(self, context_dim, hidden_size, settings):
        super().__init__(context_dim, hidden_size)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("gated", "false", False),
        ("most", "5", 5),
        ("most", "null", None),
        ("rate", "2", 2.0),
        ("parts", "[4, 16]", [4, 16]),
        ("name", "5", "5"),
        ("options", '{"a": 2}', {"a": 2}),
    ],
)
def test_settings_of_an_idea_are_read_as_json_and_checked_by_their_type(tiny_config, name, given, value):
    chosen = tiny_config.replace({"block": Chosen, f"block.{name}": given}).plugins["block"]
    assert (chosen.settings[name], type(chosen.settings[name])) == (value, type(value))
    assert chosen.settings["sizes"] == [1, 2]  # a list, as in the run's config.json


class Named(GatedBlock):
    @dataclass
    class Settings:
        code: str = "mean"


class WithoutDefaults(GatedBlock):
    @dataclass
    class Settings:
        size: int


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block": Chosen, "block.gated": "0.5"}, "block.gated is 0.5; allowed: a value of type bool"),
        ({"block": Chosen, "block.most": 2.5}, "block.most is 2.5; allowed: a value of type int or null"),
        ({"bloc": Chosen}, r"Did you mean block\?"),
        ({"block": WithoutDefaults}, "Settings cannot hold settings .*make it a dataclass whose fields have"),
        ({"block": Named}, "Settings has a setting named code; give it another name"),
        ({"block": GatedBlock(2, 3)}, "An object of type GatedBlock is not a plug-in; give a class"),
        ({"block": "nowhere:Block"}, "nowhere:Block cannot be loaded .*check name and Python path"),
    ],
)
def test_wrong_settings_of_an_idea_are_refused(tiny_config, settings, said):
    with pytest.raises(UserError, match=said):
        tiny_config.replace(settings)


def test_a_layer_that_reads_tokens_refuses_a_block_and_removes_an_earlier_one(tiny_config):
    with pytest.raises(UserError, match="reads tokens, so there is no Phase 1 and block has no effect; give"):
        tiny_config.replace({"layer": PreviousToken, "block": GatedBlock})
    assert {*tiny_config.replace({"block": GatedBlock}).replace({"layer": PreviousToken}).plugins} == {
        "layer"
    }
