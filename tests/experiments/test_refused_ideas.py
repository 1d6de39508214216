"""Ideas that cannot be trained, and wrong settings of ideas, are refused before anything is trained."""

import math
import shlex
from dataclasses import dataclass, field
from typing import Literal, Optional

import pytest
import torch
from conftest import GatedBlock, NearestTwo, PreviousToken
from torch import nn

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.method.copying import Copying
from ctxkv_lib.method.oacd import oacd_loss
from ctxkv_lib.runs.configure import run_command


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


class OwnInitOfMixer(PreviousToken):
    def init_weights(self):
        raise AssertionError


class Running(NearestTwo):
    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.BatchNorm1d(config.hidden_size)

    def forward(self, embeddings, window, present):
        return self.scale(super().forward(embeddings, window, present))


class Growing(nn.Module):
    def __init__(self, context_dim, hidden_size):
        super().__init__()
        self.linear = nn.Linear(context_dim + hidden_size, context_dim)

    def forward(self, contexts, inputs):
        return 3 * contexts + self.linear(torch.cat([contexts, inputs], dim=1))


class Nothing(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, embeddings, window, present):
        return embeddings


class Ahead(PreviousToken):
    def forward(self, embeddings, start):
        return self.out(embeddings.roll(-6, dims=1) if self.training else embeddings)[:, start:]


class InPlace(GatedBlock):
    def forward(self, contexts, inputs):
        return super().forward(contexts.mul_(0.5), inputs)


class Mixing(GatedBlock):
    def forward(self, contexts, inputs):
        return super().forward(contexts, inputs - inputs.mean(dim=0))


class MixingAttention(NearestTwo):
    def forward(self, embeddings, window, present):
        return super().forward(embeddings, window.softmax(dim=0), present)


class AlongRows(PreviousToken):
    def __init__(self, config):
        super().__init__(config)
        self.out = nn.GRU(config.hidden_size, config.hidden_size)

    def forward(self, embeddings, start):
        return self.out(embeddings)[0][:, start:]


class KeepsState(GatedBlock):
    last = 0.0

    def forward(self, contexts, inputs):
        found = super().forward(contexts, inputs + self.last)
        self.last = inputs[-1]
        return found


class FromZerosOnly(GatedBlock):
    def forward(self, contexts, inputs):
        assert not contexts.any(), "not the first context"
        return super().forward(contexts, inputs)


class Double(GatedBlock):
    def forward(self, contexts, inputs):
        return super().forward(contexts, inputs).double()


class WithoutTheNearest(NearestTwo):
    def forward(self, embeddings, window, present):
        scores = window.sum(dim=-1).masked_fill(~present, -math.inf)[:, 1:]
        return embeddings + self.out(torch.einsum("ns,nsd->nd", scores.softmax(dim=-1), window[:, 1:]))


class OneHead(NearestTwo):
    def forward(self, embeddings, window, present):
        return super().forward(embeddings, window, present), present.float()


def with_slots(*offsets):
    class Slots(NearestTwo):
        @staticmethod
        def slot_offsets(config):
            return [*offsets]

    return Slots


class Copies(NearestTwo):
    copying = Copying(weight=0.1, sharpness=8.0)


class CopiesPair(NearestTwo):
    copying = (0.1, 8.0)


class TensorAsBias(NearestTwo):
    current_token_bias = torch.tensor(-1.0)


class NoNumberAsBias(NearestTwo):
    current_token_bias = math.nan


class MasksInPlace(NearestTwo):
    def forward(self, embeddings, window, present):
        weights = self.out(window.mean(dim=1)).softmax(dim=-1)
        weights *= present[:, :1]
        return embeddings + weights


class WithoutGradient(GatedBlock):
    @torch.no_grad()
    def forward(self, contexts, inputs):
        return super().forward(contexts, inputs)


def changing_in_place(contexts):
    spread = contexts.exp()
    loss = spread.square().mean()
    spread += 1
    return loss


def with_a_term(contexts):
    return oacd_loss(contexts, 0.1)[0] + contexts.square().mean()


class CopiesAll(NearestTwo):
    copying = Copying(weight=1.0, sharpness=8.0)


class CopiesTheUnlike(NearestTwo):
    copying = Copying(weight=0.1, sharpness=-1.0)


class InChunks(NearestTwo):
    chunk = 16


@pytest.mark.parametrize(
    ("hook", "part", "said"),
    [
        ("block", Failing, r"Failing fails on 2 positions: RuntimeError: .*mat1 and mat2 shapes .*help\("),
        ("loss", constant, r"constant returned a scalar without a gradient; compute it from the contexts"),
        ("block", Narrow, r"Narrow returned a tensor of shape \[2, 15\]; .* a tensor of shape \[2, 16\]\."),
        ("attention", OneHead, r"The weights of attention are .* \[2, 2\]; allowed: \[2, heads, 2\]"),
        ("block", InPlace, r"InPlace changes what it is given in place; compute a new tensor instead\."),
        *(
            (hook, part, rf"What .*{part.__name__} returns in a row depends on other rows .*, or on earlier")
            for hook, part in (
                ("block", Mixing),
                ("block", KeepsState),
                ("attention", MixingAttention),
                ("mixer", AlongRows),
            )
        ),
        (
            "block",
            FromZerosOnly,
            r"FromZerosOnly fails on 2 positions: AssertionError: not the first context",
        ),
        (
            "block",
            Double,
            r"Double returned a float64 tensor .*; .* a tensor of shape \[2, 16\] of type float32\.",
        ),
        *(
            (
                "attention",
                with_slots(*offsets),
                rf"slot_offsets are \[{offsets[0]}, .*whole numbers, ascending from 0",
            )
            for offsets in ((0, -1), (0, 1.5), (1, 2))
        ),
        ("mixer", Ahead, r"The mixer reads ahead: the hidden state of a column may not depend on later ones"),
        ("block", Normalised, r"Normalised returned NaN or infinity; the first contexts of a stream are"),
        ("attention", WithoutTheNearest, r"WithoutTheNearest returned NaN .* only slot 0 is present"),
        ("block", BadlyMade, r"The model cannot be built with .*BadlyMade: .* has no attribute 'missing'"),
        *(
            (hook, part, rf"{part.__name__}\.init_weights must take \(embeddings, tokens, config\)")
            for hook, part in (("block", OwnInit), ("mixer", OwnInitOfMixer))
        ),
        ("attention", Running, r"Training changes the buffer attention.scale.running_mean, which is not"),
        ("attention", CopiesAll, r"Copying\(weight=1.0, .*\); allowed: a weight from 0 to less than 1, a"),
        (
            "attention",
            MasksInPlace,
            r"MasksInPlace fails on 2 positions: .* modified by an inplace operation",
        ),
        ("loss", changing_in_place, r"changing_in_place fails on 2 .* modified by an inplace operation"),
        ("block", WithoutGradient, r"WithoutGradient fails on 2 positions: .* does not require grad"),
        ("attention", CopiesPair, r"copying is \(0\.1, 8\.0\); allowed: a Copying of ctxkv_lib"),
        ("attention", TensorAsBias, r"current_token_bias is tensor.*; allowed: a finite number, which is"),
        ("attention", NoNumberAsBias, "current_token_bias is nan; allowed: a finite number"),
        ("attention", CopiesTheUnlike, r"sharpness=-1\.0\); allowed: .*, a sharpness of 0 or more"),
        ("attention", Nothing, r"Phase 2 has no weights to train; give attention or mixer a parameter\."),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(tiny_config, tmp_path, hook, part, said):
    with pytest.raises(UserError, match=said):
        run(tiny_config, tmp_path / "run", **{hook: part})
    assert not (tmp_path / "run").exists()


def test_oacd_is_part_of_a_loss_and_a_block_that_is_not_trained_needs_no_gradient(tiny_config, tmp_path):
    assert run(tiny_config, tmp_path / "run", loss=with_a_term).summary["phase1"]["iterations"] > 1
    untrained = tiny_config.replace({"phase1.max_iterations": 0})
    run(untrained, tmp_path / "untrained", block=WithoutGradient)


def test_contexts_that_overflow_are_refused_with_what_to_change(tiny_config, tmp_path):
    with pytest.raises(UserError, match="of the train stream grow beyond all numbers; bound what the block"):
        run(tiny_config, tmp_path / "run", block=Growing)


STREAMED = {"runtime.context_cache": "streamed"}


@pytest.mark.parametrize(
    ("settings", "hook", "part", "said"),
    [
        (
            STREAMED,
            "attention",
            InChunks,
            "chunk needs contexts that are kept; set runtime.context_cache=cached",
        ),
        (
            {"phase1.max_iterations": 0},
            "loss",
            with_a_term,
            "trains nothing here, so that .*with_a_term has no effect",
        ),
    ],
)
def test_what_does_not_go_with_other_settings_is_refused(tiny_config, tmp_path, settings, hook, part, said):
    with pytest.raises(UserError, match=said):
        run(tiny_config.replace(settings), tmp_path / "run", **{hook: part})


class Chosen(GatedBlock):
    @dataclass
    class Settings:
        gated: bool = True
        most: Optional[int] = 3  # noqa: UP045 (as many write it)
        kind: Literal["fast", "slow"] = "fast"
        sizes: tuple = (1, 2)
        parts: list[int] = field(default_factory=lambda: [4])
        order: Literal[1, 2] = 1
        mixed: int | float = 3
        options: dict = field(default_factory=dict)

    def __init__(self, context_dim, hidden_size, settings):
        super().__init__(context_dim, hidden_size)


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("gated", "False", False),
        ("most", "5", 5),
        ("most", None, None),
        ("most", "None", None),
        ("parts", "[4, 16]", [4, 16]),
        ("parts", [4, 16], [4, 16]),
        ("order", "2", 2),
        ("mixed", "0.5", 0.5),
        ("options", '{"a": 2}', {"a": 2}),
        ("mixed", "2", 2),
    ],
)
def test_words_are_read_as_the_types_of_an_ideas_own_settings(tiny_config, name, word, value):
    chosen = tiny_config.replace({"block": Chosen, f"block.{name}": word}).plugins["block"]
    assert (chosen.settings[name], type(chosen.settings[name])) == (value, type(value))
    assert chosen.settings["sizes"] == [1, 2]  # as in the run's config.json


def test_the_command_that_makes_a_run_again_gives_the_settings_of_an_idea(tiny_config, tmp_path):
    asked = tiny_config.replace(
        {"block": Chosen, "block.most": None, "block.parts": [4, 16], "block.options": {"a": 2}}
    )
    words = shlex.split(run_command(asked, tmp_path))
    pairs = [words[place + 1].partition("=") for place, word in enumerate(words) if word == "--set"]
    given = {key: text for key, _, text in pairs if key.startswith("block.")}
    assert tiny_config.replace({"block": Chosen, **given}).plugins == asked.plugins


class Named(GatedBlock):
    @dataclass
    class Settings:
        source: str = "a"


class Derived(GatedBlock):
    @dataclass
    class Settings:
        size: int = 2
        double: int = field(init=False, default=4)


def test_a_field_that_is_not_given_is_no_setting(tiny_config):
    assert tiny_config.replace({"block": Derived, "block.size": 3}).plugins["block"].settings == {"size": 3}


class WithoutDefaults(GatedBlock):
    @dataclass
    class Settings:
        size: int


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block": Chosen, "block.gated": "0.5"}, "block.gated is '0.5'; allowed: true or false"),
        ({"block": Chosen, "block.parts": "4,16"}, r"block.parts is '4,16'; allowed: JSON, such as \[1, 2\]"),
        ({"block": Chosen, "block.kind": "quick"}, "block.kind is 'quick'; allowed: fast, slow"),
        ({"bloc": Chosen}, r"Did you mean block\?"),
        ({"block": Named}, "Settings has a field 'source'; give it another name"),
        ({"block": WithoutDefaults}, "Settings holds no settings .*make it a dataclass whose fields have"),
        ({"block": GatedBlock(2, 3)}, "An object of type GatedBlock is no plug-in; give a class"),
        ({"loss": eval("lambda contexts: contexts.mean()")}, "is not to be found; define it with def"),
    ],
)
def test_other_words_are_refused(tiny_config, settings, said):
    with pytest.raises(UserError, match=said):
        tiny_config.replace(settings)
