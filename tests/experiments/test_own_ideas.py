"""Ideas of a user, passed to `run` as classes and functions, go through the same stages as the method."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from conftest import GatedBlock, NearestTwo, PreviousToken, flip, local_experiment, stop_at
from ctxkv_lib.hf import plugins
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import prepare, run
from ctxkv_lib.method import model
from ctxkv_lib.method.contexts import distinct_rows, exact_contexts
from ctxkv_lib.method.copying import Copying
from ctxkv_lib.runs import contexts, stages
from ctxkv_lib.runs.caches import load_cache
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.differences import run_names
from ctxkv_lib.runs.listing import list_runs
from ctxkv_lib.runs.plugins import loaded
from ctxkv_lib.runs.run_folder import RunFolder, run_folder_of
from ctxkv_lib.runs.trained import generate_text, load_model, load_trained
from ctxkv_lib.runs.work import Work


def spread(contexts):
    return contexts.square().mean() - contexts.std()


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


def test_an_idea_goes_through_the_stages_is_named_wherever_the_run_is_and_is_reused(
    idea, config, plain, printed_by, monkeypatch
):
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
    monkeypatch.setattr(Work, "model", None)
    assert run(config, made.path, **{hook: IDEAS[hook]}).summary == made.summary


def test_a_configuration_of_before_a_change_is_refused_and_another_one_is_another_run(config, tmp_path):
    class Scaled(GatedBlock):
        scale = 1.0

        def forward(self, contexts, inputs):
            return super().forward(contexts, inputs) * self.scale

    before = config.replace({"block": Scaled})
    run(before, tmp_path / "run")
    Scaled.scale = 0.5
    with pytest.raises(UserError, match=r"What .*Scaled uses has changed since its configuration was made"):
        run(before, tmp_path / "run")
    assert run_folder_of(config.replace({"block": Scaled})) != run_folder_of(before)


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


def test_a_saved_model_never_loads_as_another_block(config, tmp_path, monkeypatch, own_module):
    made = run(config, tmp_path / "run", block=f"{own_module('my_ideas', MY_IDEAS)}:Mine")
    trained = load_model(made.path, made.config).context_block
    served, _ = load_trained(made.path, torch.device("cpu"))
    contexts, inputs = torch.randn(3, 16), torch.randn(3, 16)
    assert torch.equal(served.context_block(contexts, inputs), trained(contexts, inputs))
    own_module("my_ideas", MY_IDEAS.replace("0.9", "0.81"))
    monkeypatch.setattr("ctxkv_lib.runs.plugins.digested", {})  # as in another process
    with pytest.raises(UserError, match="The source of my_ideas:Mine is not what the run was made with"):
        load_trained(made.path, torch.device("cpu"))
    again = AutoModelForCausalLM.from_pretrained(made.path / "model").context_block  # still known here
    assert torch.equal(again(contexts, inputs), trained(contexts, inputs))
    monkeypatch.setattr(plugins, "NAMED", {})
    with pytest.raises(ValueError, match="The file of my_ideas:Mine is not what the model was saved with"):
        AutoModelForCausalLM.from_pretrained(made.path / "model")
    own_module("my_ideas", "# The same.\n" + MY_IDEAS)
    AutoModelForCausalLM.from_pretrained(made.path / "model")


def test_a_changed_method_is_not_saved_and_said_to_be_other_code_later_whose_result_is_kept(
    config, tmp_path, monkeypatch, capsys
):
    plain = model.ContextBlock.forward

    def halved(self, contexts, inputs):
        return plain(self, contexts / 2, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(model.ContextBlock, "forward", halved)
        made = run(config, tmp_path / "run")
        assert "not saved for transformers: ContextBlock.forward was replaced" in capsys.readouterr().err
        load_trained(made.path)
        assert "other code" not in capsys.readouterr().err
    load_trained(made.path)
    assert f"{made.path} was made with other code of the method" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"finished result of other code, which is kept; .* --again"):
        run(config, made.path)
    assert json.loads((made.path / "summary.json").read_text()) == made.summary
    with pytest.raises(KeyboardInterrupt):
        run(config, made.path, stop_at("phase1"), again=True)
    (stopped,) = list_runs(made.path)
    assert stopped.state == "interrupted"  # its results are no longer those of its metrics
    again = run(config, made.path)
    assert again.summary["phase2"]["val_ppl"] != made.summary["phase2"]["val_ppl"]
    assert again.summary["phase2"]["val_ppl"] == run(config, tmp_path / "other").summary["phase2"]["val_ppl"]


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


BROKEN = [("1 / 0", "ZeroDivisionError: div"), ("def", "SyntaxError: "), ("exit(0)", "SystemExit: 0")]


@pytest.mark.parametrize(("code", "said"), BROKEN)
def test_a_module_that_cannot_be_imported_is_refused_in_a_sentence(config, own_module, code, said):
    with pytest.raises(UserError, match=f"broken:Block cannot be loaded .{said}.*correct its file"):
        config.replace({"block": f"{own_module('broken', code)}:Block"})


class Drawn(NearestTwo):
    def init_from_block(self, block):
        torch.nn.init.normal_(self.out.weight, std=0.05)


def test_an_init_after_phase_1_draws_the_same_whether_phase_1_was_reused_or_not(config, tmp_path):
    whole = run(config, tmp_path / "whole", attention=Drawn)
    prepare(whole.config, tmp_path / "stopped")
    again = run(whole.config, tmp_path / "stopped")
    assert again.summary["phase2"]["val_ppl"] == whole.summary["phase2"]["val_ppl"]


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
    assert "Scaled is defined in a notebook, a script, a function or a class, not in a module" in said
    assert not (made.path / "model").exists()
    assert generate_text(made, "a", max_new_tokens=1).startswith("a")
    model, tokenizer = load_trained(made.path)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(UserError, match=r"finished result of other code, which is kept; .* --again"):
        run(second, made.path)
    assert run(second, made.path, again=True).config == second


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


class CopiesLater(NearestTwo):
    copying = Copying(weight=0.1, sharpness=8.0)

    def init_from_block(self, block):
        self.copying = Copying(weight=0.5, sharpness=8.0)


@pytest.mark.parametrize("part", [Remembering, Counting, CopiesLater])
def test_what_is_not_saved_is_not_trained_in_silence(config, tmp_path, part):
    hook = "block" if issubclass(part, GatedBlock) else "attention"
    with pytest.raises(UserError, match="computes something else than what is saved of it; keep all"):
        run(config, tmp_path / "run", **{hook: part})
    trained = [line["stage"] for line in RunFolder(tmp_path / "run").metric_lines()].count("phase2")
    assert trained == (part is Counting)


class Made(NearestTwo):
    made = 0

    def __init__(self, config):
        super().__init__(config)
        Made.made += 1


class Drawing(NearestTwo):
    def forward(self, embeddings, window, present):
        return super().forward(embeddings, window + torch.randn_like(window), present)


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


@pytest.mark.parametrize("part", [Made, Drawing, Tied, Orthogonal, Unsaved])
def test_what_counts_or_draws_or_transformers_cannot_save_trains_and_generates(config, tmp_path, part):
    hook = "block" if issubclass(part, GatedBlock) else "attention"
    made = run(config, tmp_path / "run", **{hook: part})
    assert made.summary["phase2"]["val_ppl"] > 1
    assert generate_text(made, "tea", max_new_tokens=2, temperature=0).startswith("tea")


def test_what_only_phase_2_depends_on_trains_no_phase_1_again(config, plain, monkeypatch, capsys):
    monkeypatch.setattr(contexts, "_train_block", None)
    changed = config.replace({"model.interval": 4, "attention": NearestTwo})
    made = run(changed, plain.path.with_name(run_folder_of(changed).name))
    assert "phase1 is taken from" in capsys.readouterr().err
    assert made.summary["phase1"] == plain.summary["phase1"]


def test_the_advice_when_memory_ends_keeps_phase_1(config, tmp_path, monkeypatch, capsys):
    first = run_folder_of(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_attention", Mock(side_effect=MemoryError))
        said = "Phase 2 ran out of memory .* lower phase2.batch_size, and run again: what is finished is kept"
        with pytest.raises(UserError, match=said):
            run(config, first)
    damaged, broken = shutil.copytree(first, tmp_path / "another"), tmp_path / "broken" / "checkpoint"
    flip(damaged / "checkpoint" / "context_block.safetensors")
    broken.mkdir(parents=True)
    (broken / "stages.json").write_text("{")
    monkeypatch.setattr(contexts, "_train_block", None)
    monkeypatch.setattr("os.link", Mock(side_effect=OSError))  # as of a file system without links
    smaller = config.replace({"phase2.batch_size": 64})
    assert run(smaller, run_folder_of(smaller, tmp_path)).summary["phase2"]["val_ppl"] > 1
    assert f"phase1 is taken from {first.name}" in capsys.readouterr().err
