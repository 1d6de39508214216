"""A user's idea is trained, named wherever its run appears, and never confused with another idea."""

import importlib
import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import GatedBlock, NearestTwo, PreviousToken, lasting, stop_at, tiny_method
from torch import nn
from transformers import AutoModelForCausalLM

from ctxkv_lib import export
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import prepare, run
from ctxkv_lib.files import read_tensors
from ctxkv_lib.measure.other_text import evaluate_texts
from ctxkv_lib.method.block import project_inputs
from ctxkv_lib.method.contexts import distinct_rows, exact_contexts
from ctxkv_lib.method.oacd import oacd_loss
from ctxkv_lib.plugins import plugins
from ctxkv_lib.plugins.checks import try_plugins
from ctxkv_lib.report.tables import format_scores
from ctxkv_lib.runs import training
from ctxkv_lib.runs.config import config_from_dict
from ctxkv_lib.runs.folders import run_folder_of
from ctxkv_lib.runs.generation import generate_text
from ctxkv_lib.runs.listing import results
from ctxkv_lib.runs.opened import open_run
from ctxkv_lib.views.explore import explore_window


def squared(contexts):
    """A Phase 1 loss, as a user might write it."""
    return (contexts.square().mean() - 1) ** 2


def raised(contexts, power):
    return contexts.abs().pow(power).mean()


class Target:
    def __init__(self, value):
        self.value = value

    def __call__(self, contexts):
        return (contexts.square().mean() - self.value) ** 2

    def twice(self, contexts):
        return 2 * self(contexts)

    def __len__(self):  # the object counts as false
        return 0


class NextToken(nn.Module):
    """A Phase 1 loss that has weights and predicts the next embedding, as a user might write it."""

    def __init__(self, context_dim, hidden_size):
        super().__init__()
        self.guess = nn.Linear(context_dim, hidden_size)

    def forward(self, contexts, next_embeddings):
        return (self.guess(contexts) - next_embeddings).square().mean()


WEIGHTS = 16 * 24 + 24  # parameters of NextToken
IDEAS = {"block": GatedBlock, "loss": squared, "objective": NextToken}
IDEAS |= {"layer": NearestTwo, "tokens": PreviousToken}


@pytest.fixture
def config(tiny_config):
    return tiny_config.replace({"phase2.max_epochs": 1})


@pytest.fixture(scope="module")
def plain(finished_run):
    return run(finished_run.config.replace({"phase2.max_epochs": 1}), finished_run.path.with_name("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", IDEAS)
def test_an_idea_is_trained_named_wherever_its_run_is_and_reused(kind, plain, tmp_path):
    hook, idea = {"tokens": "layer", "objective": "loss"}.get(kind, kind), IDEAS[kind]
    made = run(plain.config, tmp_path / "run", **{hook: idea})
    name = f"{idea.__module__}:{idea.__name__}"
    assert made.summary["phase2"]["val_ppl"] != plain.summary["phase2"]["val_ppl"]
    assert json.loads((made.path / "config.json").read_text())[hook]["plugin"] == name
    assert name in (made.path / "own_parts" / f"{hook}.py").read_text(encoding="utf-8").splitlines()[0]
    assert made.summary["parameters"].get("objective", 0) == WEIGHTS * (kind == "objective")
    for report in ("report.md", "report.ja.md"):
        assert name in (made.path / report).read_text(encoding="utf-8")
    assert results([plain, made])[f"{hook}.plugin"].to_list()[1] == name
    assert idea.__name__ in run_folder_of(made.config).name
    assert run(plain.config, made.path, **{hook: idea}).summary == made.summary
    if hook == "layer":
        with pytest.raises(UserError, match="returns no attention weights"):
            explore_window(made, 3)
    text = generate_text(made, "the tea", max_new_tokens=3, temperature=0)
    assert text.startswith("the tea")
    opened, scores = open_run(made), evaluate_texts(made, [text])
    read = opened.read(text)
    assert read.token_losses().mean().exp().item() == pytest.approx(scores["ppl"], rel=1e-5)
    if kind == "tokens":
        ids = opened.tokenizer("the tea")["input_ids"]
        for _ in range(3):  # append the most likely token
            with torch.no_grad():
                hidden, _ = opened.model.apply_layer(opened.model.embed(torch.tensor([ids])), 0)
                ids.append(int(opened.model.logits(hidden[0, -1:], torch.tensor(ids[-1:])).argmax()))
        assert opened.tokenizer.decode(ids) == text
        assert "Contexts in the window" not in format_scores(scores)
        share = opened.stream("test").logits([3]).softmax(dim=-1)[0, opened.stream("test").ids[4]]
        assert -share.log() == pytest.approx(opened.stream("test").token_losses()[3].item(), abs=0.005)
        with pytest.raises(UserError, match="reads tokens, so the run has no contexts"):
            read.contexts()


def test_the_weights_of_a_loss_depend_only_on_the_seed_and_are_counted_but_not_saved(
    config, tmp_path, monkeypatch
):
    blocks = []
    for number in range(2):
        monkeypatch.setenv("CTXKV_CACHE", str(tmp_path / str(number)))
        torch.manual_seed(number)
        prepared = prepare(config, tmp_path / f"run{number}", loss=NextToken)
        (saved,) = (tmp_path / str(number)).glob("contexts-*/block.safetensors")
        blocks.append(read_tensors(saved))
    assert blocks[0].keys() == prepared.model.context_block.state_dict().keys()
    for name, weight in blocks[0].items():
        assert torch.equal(weight, blocks[1][name]), name
    assert prepared.run.summary["parameters"]["objective"] == WEIGHTS


CALLABLES = {
    "raised": (partial(raised, power=2), partial(raised, power=2), partial(raised, power=3)),
    "Target": (Target(1), Target(1), Target(2)),
    "Target.twice": (Target(1).twice, Target(1).twice, Target(2).twice),
    "oacd_loss": tuple(partial(oacd_loss, centroid_weight=weight) for weight in (0.5, 0.5, 0.1)),
}


@pytest.mark.parametrize(("name", "losses"), CALLABLES.items(), ids=CALLABLES)
def test_a_loss_may_be_any_callable_and_is_identified_by_the_values_it_holds(config, tmp_path, name, losses):
    one, same, other = (config.with_plugins(loss=loss) for loss in losses)
    plugin = one.plugins["loss"]
    assert plugin.name == f"{losses[0].func.__module__ if 'oacd' in name else __name__}:{name}(...)"
    assert plugin == same.plugins["loss"]
    assert plugin.code != other.plugins["loss"].code != ""
    assert run_folder_of(one) == run_folder_of(same) != run_folder_of(other)
    prepared = prepare(one, tmp_path / "run")
    assert prepared.run.summary["phase1"]["iterations"] > 1
    with pytest.raises(UserError, match=r"is an object, which exists in one process only; give it again\."):
        config_from_dict(one.to_dict()).plugins["loss"].build()


def test_a_module_may_hold_a_loss_that_is_an_object(config, own_module):
    module = own_module("my_losses", "import functools\nlow = functools.partial(max, 1)\n")
    assert config.with_plugins(loss=f"{module}:low").plugins["loss"].name == "my_losses:low"


MY_IDEAS = """
from dataclasses import dataclass
from ctxkv_lib.method.block import ContextBlock
FACTOR = 0.9
class Mine(ContextBlock):
    @dataclass
    class Settings:
        sign: int = 1
    def __init__(self, context_dim, hidden_size, settings):
        super().__init__(context_dim, hidden_size)
        self.sign = settings.sign
    def forward(self, contexts, inputs):
        return super().forward(FACTOR * self.sign * contexts, inputs)
def turned(context_dim, hidden_size):
    return Mine(context_dim, hidden_size, Mine.Settings(-1))
"""


@pytest.mark.slow
def test_a_trained_model_never_loads_with_a_changed_block(config, tmp_path, own_module):
    module = importlib.import_module(own_module("my_ideas", MY_IDEAS))
    made = run(config.with_plugins(block=module.Mine).replace({"block.sign": -1}), tmp_path / "run")
    contexts, inputs = torch.randn(3, 16), torch.randn(3, 16)
    expected = open_run(made).model.context_block(contexts, inputs)
    exported = export(made, tmp_path / "model")
    changed = "The code of my_ideas:Mine, or what it uses, is not what the run was"
    module.FACTOR = 0.5  # only in memory
    for use in (lambda: open_run(made), lambda: run(made.config, tmp_path / "other")):
        with pytest.raises(UserError, match=changed):
            use()
    own_module("my_ideas", MY_IDEAS.replace("0.9", "0.81"))
    kept = made.path / "own_parts" / "block.py"
    with pytest.raises(UserError, match=f"{changed}.* the run was made with is in {re.escape(str(kept))}"):
        open_run(made.path)
    assert kept.read_text(encoding="utf-8") == f"# my_ideas.py, which defines my_ideas:Mine\n{MY_IDEAS}"
    # The exported model has the code and the settings that it was trained with.
    saved = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    torch.testing.assert_close(saved.model.context_block(contexts, inputs), expected)
    own_module("my_ideas", "# The same.\n" + MY_IDEAS)
    torch.testing.assert_close(open_run(made.path).model.context_block(contexts, inputs), expected)


@pytest.mark.slow
def test_a_model_whose_files_compute_something_else_is_not_exported(config, tmp_path, own_module):
    made = run(config, tmp_path / "run", block=f"{own_module('my_ideas', MY_IDEAS)}:turned")
    assert generate_text(made, "tea", max_new_tokens=1).startswith("tea")
    with pytest.raises(UserError, match="cannot be exported: loaded from its files, it computes something"):
        export(made)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


class Dropping(GatedBlock):
    def forward(self, contexts, inputs):
        return super().forward(nn.functional.dropout(contexts, 0.5, self.training), inputs)


def test_cached_contexts_are_those_of_the_opened_block(config, tmp_path):
    made = run(config.replace({"runtime.precision": "fp32"}), tmp_path / "run", block=Dropping)
    trained = open_run(made)
    for cache in trained.streams.values():
        block, zero = trained.model.context_block, torch.zeros(cache.contexts.shape[1])
        embeddings, tokens = distinct_rows(trained.model, cache.ids[:-1])
        expected = exact_contexts(block, project_inputs(block, embeddings), tokens, zero, 1e-5)
        torch.testing.assert_close(cache.contexts, expected, atol=1e-4, rtol=0)


def test_a_run_of_an_idea_made_with_a_different_python_prints_a_warning(
    config, tmp_path, monkeypatch, capsys
):
    begun = config.with_plugins(block=GatedBlock)
    upgraded = SimpleNamespace(version_info=SimpleNamespace(major=3, minor=99))
    monkeypatch.setattr(plugins, "sys", upgraded)
    prepare(begun, tmp_path / "run")
    name = f"{GatedBlock.__module__}:GatedBlock"
    said = f"made with a different Python: {name} may compute something different here"
    assert said in capsys.readouterr().err


class Counting(GatedBlock):
    def __init__(self, context_dim, hidden_size):
        super().__init__(context_dim, hidden_size)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, contexts, inputs):
        self.calls += self.training
        return super().forward(contexts, inputs)


def test_the_trial_of_a_block_leaves_its_buffers_as_they_were(config):
    model = tiny_method(Counting)
    try_plugins(model, config.with_plugins(block=Counting).plugins)
    assert model.context_block.calls == 0


class Drawn(NearestTwo):
    def init_weights(self, embeddings, tokens, config):
        torch.nn.init.normal_(self.out.weight, std=0.05)


@pytest.mark.slow
def test_an_init_after_phase_1_draws_the_same_whether_phase_1_was_reused_or_not(config, tmp_path, own_store):
    whole = run(config, tmp_path / "whole", layer=Drawn)
    again = run(whole.config, tmp_path / "again")
    assert again.summary["phase2"]["val_ppl"] == whole.summary["phase2"]["val_ppl"]


def of_size(factor):
    class Scaled(GatedBlock):
        def forward(self, contexts, inputs):
            return super().forward(factor * contexts, inputs)

    return Scaled


@pytest.mark.slow
def test_the_state_of_another_layer_is_not_continued(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "EVERY_SECONDS", 0)
    config = tiny_config.replace({"phase2.max_epochs": 2})

    def scaled(factor):
        class Scaled(NearestTwo):
            def forward(self, embeddings, window, present):
                return super().forward(embeddings, factor * window, present)

        return Scaled

    expected = run(config, tmp_path / "whole" / "run", layer=scaled(2.0))
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", stop_at("phase2", 2), layer=scaled(1.0))
    found = run(config, tmp_path / "run", layer=scaled(2.0))
    assert lasting(found.summary) == lasting(expected.summary)
    assert "starts again from its first epoch, since the code of layer differs." in capsys.readouterr().err


def test_classes_from_one_function_are_different_ideas(config, tmp_path):
    parts = [of_size(factor) for factor in (0.5, 0.9)]
    first, second = (config.with_plugins(block=part) for part in parts)
    assert [each.plugins["block"].part for each in (first, second)] == parts
    assert run_folder_of(first) != run_folder_of(second)
    made = run(first, tmp_path / "run")
    with pytest.raises(UserError, match=r"the code of block differs; replace it with --again"):
        run(second, made.path)


class Remembering(GatedBlock):
    def init_weights(self, embeddings, tokens, config):
        self.scale = 3.0

    def forward(self, contexts, inputs):
        return super().forward(contexts, inputs) * getattr(self, "scale", 1.0)


class LaterOther(NearestTwo):
    steps = 0

    def forward(self, embeddings, window, present):
        self.steps += self.training
        return super().forward(embeddings, window, present) * (1 + (self.steps > 3))


class Listed(GatedBlock):
    def __init__(self, context_dim, hidden_size):
        super().__init__(context_dim, hidden_size)
        self.more = [nn.Linear(context_dim, context_dim)]

    def forward(self, contexts, inputs):
        return super().forward(self.more[0](contexts), inputs)


class Directed(NearestTwo):
    def __init__(self, config):
        super().__init__(config)
        self.directions = torch.randn(config.hidden_size)

    def forward(self, embeddings, window, present):
        return super().forward(embeddings, window, present) * self.directions


class NoisyBlock(GatedBlock):
    def forward(self, contexts, inputs):
        return super().forward(contexts, inputs) + torch.randn_like(contexts)


class NoisyLayer(NearestTwo):
    def forward(self, embeddings, window, present):
        return super().forward(embeddings, window, present) + torch.randn_like(embeddings)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *(("block", part) for part in (Remembering, Listed, NoisyBlock)),
        *(("layer", part) for part in (LaterOther, Directed, NoisyLayer)),
    ],
)
def test_a_part_that_computes_something_else_after_loading_is_refused(config, tmp_path, kind, part):
    with pytest.raises(UserError, match="computes something different from its saved copy; keep all"):
        run(config, tmp_path / "run", **{kind: part})
    assert not (tmp_path / "run" / "weights.safetensors").exists()  # so that the mended part may train here


class Tied(GatedBlock):
    def __init__(self, context_dim, hidden_size):
        super().__init__(context_dim, hidden_size)
        self.new.weight = self.gate.weight


class Buffered(NearestTwo):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("directions", torch.randn(config.hidden_size))
        self.register_buffer("two", torch.tensor(2.0), persistent=False)

    def forward(self, embeddings, window, present):
        self.directions += 0.1 * self.training
        return super().forward(embeddings, window, present) * self.directions * self.two


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "part"), [("block", Tied), ("layer", Buffered)])
def test_parts_that_transformers_cannot_save_train_and_generate(config, tmp_path, kind, part):
    made = run(config, tmp_path / "run", **{kind: part})
    assert generate_text(made, "tea", max_new_tokens=2, temperature=0).startswith("tea")
    with pytest.raises(UserError, match=r"The model of .* cannot be exported: "):
        export(made)
