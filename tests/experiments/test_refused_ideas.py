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


def with_last(found, other):
    """Add the last component of `other` to the last component of `found`."""
    return torch.cat([found[..., :-1], found[..., -1:] + other[..., -1:]], dim=-1)


def following(rows):
    """Return for each row the next one, and for the last row itself."""
    return torch.cat([rows[1:], rows[-1:]])


FAR_AHEAD = giving(PreviousToken, lambda _, embeddings, start: embeddings.roll(-6, dims=1)[:, start:])
ONE_AHEAD = giving(
    PreviousToken, lambda found, embeddings, start: with_last(found, embeddings.roll(-1, dims=1)[:, start:])
)
EVENLY_AHEAD = giving(
    PreviousToken, lambda found, embeddings, start: embeddings.roll(-1, dims=1).abs()[:, start:]
)
AT_THE_END = giving(PreviousToken, lambda found, embeddings, _: with_last(found, embeddings[:, -1:]))
NEXT_CONTEXT = giving(GatedBlock, lambda found, contexts, _: with_last(found, following(contexts)))
NEXT_INPUT = giving(GatedBlock, lambda found, _, inputs: with_last(found, following(inputs)))
NEXT_EMBEDDING = giving(NearestTwo, lambda found, embeddings, *_: with_last(found, following(embeddings)))
NEXT_WINDOW = giving(NearestTwo, lambda found, _, window, __: with_last(found, following(window[:, -1])))


class Standardized(GatedBlock):
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


class Misread(PreviousToken):
    reads = "Tokens"


class Empty(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, embeddings, window, present):
        return embeddings


def of_each(contexts):
    return contexts.square().mean(dim=1)


def detached(contexts):
    return contexts.detach().square().mean()


class Blind(nn.Module):
    """A loss that has weights but ignores the contexts, so that no gradient reaches them."""

    def __init__(self, context_dim, hidden_size):
        super().__init__()
        self.read = nn.Linear(context_dim, hidden_size)

    def forward(self, previous, embeddings):
        return (self.read(previous) - embeddings).square().mean()


CALLS = []


def logged(contexts):
    CALLS.append(len(contexts))
    return contexts.square().mean()


class Counted:
    calls = 0

    def __call__(self, contexts):
        self.calls += 1
        return contexts.square().mean()


class CountedBlock(GatedBlock):
    calls = 0

    def forward(self, contexts, inputs):
        CountedBlock.calls += 1
        return super().forward(contexts, inputs)


class CountedLayer(NearestTwo):
    steps = 0

    def forward(self, embeddings, window, present):
        CountedLayer.steps += self.training
        return super().forward(embeddings, window, present)


@pytest.mark.parametrize(
    ("kind", "part", "said"),
    [
        ("block", NARROW, r"Other returned float32 of shape \[2, 15\]; it must .* of shape \[2, 16\]\."),
        ("block", DOUBLE, r"Other returned float64 of shape \[2, 16\]; it must return float32"),
        ("block", NORMALISED, r"Other returned NaN or infinity; the first contexts of a stream are"),
        ("block", Standardized, r"What .*Standardized returns in a row depends on other rows"),
        ("layer", MIXING, r"What .*Other returns in a row depends on other rows"),
        ("layer", WithoutTheNearest, r"WithoutTheNearest returned NaN .* only slot 0 is present"),
        ("layer", WITHOUT_HEADS, r"Other returned weights of shape \[2, 2\]; allowed: \[n, heads"),
        ("layer", with_slots(0, -1), r"slot_offsets of .* are \[0, -1\]; allowed: whole numbers, asc"),
        ("layer", with_slots(0, 1.5), r"slot_offsets of .* are \[0, 1\.5\]"),
        ("layer", FAR_AHEAD, r"Other reads ahead: the hidden state of a column may not depend on later"),
        ("layer", ONE_AHEAD, r"Other reads ahead"),
        ("layer", EVENLY_AHEAD, r"Other reads ahead"),
        ("layer", Misread, "reads of .*Misread is 'Tokens'; allowed: contexts, tokens"),
        ("layer", AT_THE_END, r"Other reads ahead"),
        ("block", NEXT_CONTEXT, r"What .*Other returns in a row depends on other rows"),
        ("block", NEXT_INPUT, r"What .*Other returns in a row depends on other rows"),
        ("layer", NEXT_EMBEDDING, r"What .*Other returns in a row depends on other rows"),
        ("layer", NEXT_WINDOW, r"What .*Other returns in a row depends on other rows"),
        ("layer", AlongRows, r"What .*AlongRows returns in a row depends on other rows .*batch_first=True"),
        ("layer", Empty, r"Empty has no parameters, so Phase 2 has nothing to train"),
        ("loss", nn.Identity(), r"An object of type Identity is not a plug-in; give a class or a funct"),
        ("loss", of_each, r"of_each returned float32 of shape \[\d+\]; a loss must return a finite scalar"),
        ("loss", detached, "detached returned a number without a gradient, so nothing would be trained; com"),
        ("loss", Blind, "Blind returned a number without a gradient, so nothing would be trained; compute"),
        ("loss", logged, "logged changes itself, or values that it uses, when it is called; keep numbers th"),
        ("loss", Counted(), r"Counted\(\.\.\.\) changes itself, or values that it uses, when it is called"),
        ("block", CountedBlock, "CountedBlock changes itself, or values that it uses, when it is called"),
        ("layer", CountedLayer, "CountedLayer changes itself, or values that it uses, when it is called"),
    ],
)
def test_an_idea_that_would_be_silently_wrong_is_refused(tiny_config, tmp_path, kind, part, said):
    with pytest.raises(UserError, match=said):
        run(tiny_config, tmp_path / "run", **{kind: part})
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
    chosen = tiny_config.with_plugins(block=Chosen).replace({f"block.{name}": given}).plugins["block"]
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
    ("plugins", "settings", "said"),
    [
        ({"block": Chosen}, {"block.gated": "0.5"}, "block.gated is 0.5; allowed: a value of type bool"),
        ({"block": Chosen}, {"block.most": 2.5}, "block.most is 2.5; allowed: a value of type int or null"),
        ({"block": Chosen}, {"block.rat": 2}, r"Unknown setting 'block.rat'\. .* Did you mean block\.rate\?"),
        ({}, {"block.rate": 2}, r"no plug-in is given; add one with --block module:Name \(block=\.\.\.\)"),
        ({"bloc": Chosen}, {}, r"plug-in is 'bloc'; allowed: block, loss, layer\. Did you mean block\?"),
        (
            {"block": WithoutDefaults},
            {},
            "Settings cannot contain settings .*make it a dataclass whose field",
        ),
        ({"block": Named}, {}, "Settings has a setting named code; give it another name"),
        ({"block": GatedBlock(2, 3)}, {}, "An object of type GatedBlock is not a plug-in; give a class"),
        ({"block": "nowhere:Block"}, {}, "nowhere:Block cannot be loaded .*check name and Python path"),
    ],
)
def test_wrong_plugins_and_settings_are_refused(tiny_config, plugins, settings, said):
    with pytest.raises(UserError, match=said):
        tiny_config.with_plugins(**plugins).replace(settings)


def test_a_layer_that_reads_tokens_refuses_a_block_and_removes_an_earlier_one(tiny_config):
    with pytest.raises(UserError, match="reads tokens, so there is no Phase 1 and block has no effect; give"):
        tiny_config.with_plugins(layer=PreviousToken, block=GatedBlock)
    changed = tiny_config.with_plugins(block=GatedBlock).with_plugins(layer=PreviousToken)
    assert {*changed.plugins} == {"layer"}
