"""Tests of what an open run shows about its own streams and about new text."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.measure.other_text import evaluate_texts
from ctxkv_lib.method.block import project_inputs
from ctxkv_lib.runs.opened import open_run
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.views.explore import explore_window


def test_losses_of_tokens_have_the_perplexity_of_the_summary_and_are_those_of_the_logits(trained):
    stream = trained.stream("val")
    losses = stream.token_losses()
    assert losses.mean().exp().item() == pytest.approx(trained.run.summary["phase2"]["val_ppl"], rel=1e-5)
    positions = [len(losses) - 1, 0, 20]
    targets = torch.stack([stream.ids[i + 1] for i in positions]).long()
    nats = F.cross_entropy(stream.logits(positions), targets, reduction="none")
    torch.testing.assert_close(nats, losses[positions], rtol=0, atol=0.005)


def test_the_test_stream_has_the_losses_of_the_summary(trained):
    test = trained.run.summary["test"]
    losses = trained.stream("test").token_losses()
    assert losses.mean().exp().item() == pytest.approx(test["ppl"], rel=1e-5)
    by_conversation = losses.split([count for count, _ in test["conversations"]])
    means = [loss for _, loss in test["conversations"]]
    assert [part.mean().item() for part in by_conversation] == pytest.approx(means, rel=1e-4)


def test_other_text_is_read_as_it_is_evaluated_and_explored(trained):
    text = "the cat sat on some old mat while rain fell and tea was made"
    read = trained.read(text)
    assert trained.tokenizer.decode(read.ids.tolist()) == f"<|endoftext|>{text}"
    ppl = evaluate_texts(trained.run, [text])["ppl"]
    assert read.token_losses().mean().exp().item() == pytest.approx(ppl, rel=1e-5)
    assert len(read) == len(read.contexts()) == len(read.ids) - 1
    assert read.attention([3]).sum(dim=-1).tolist() == [pytest.approx([1] * trained.model.config.num_heads)]
    assert explore_window(read, 3).figure.axes[0].get_title(loc="left").startswith("What position 3 attends")
    for nothing in ("", "caf\udce9", None):
        with pytest.raises(UserError, match="The text is empty or not UTF-8; give at least one character"):
            trained.read(nothing)


def test_a_run_without_test_conversations_says_so(trained):
    untested = trained.run.config.replace({"data.test_samples": 0})
    opened = replace(trained, run=replace(trained.run, config=untested))
    with pytest.raises(UserError, match=r"has no test text; make a run with data\.test_samples above 0"):
        opened.stream("test")


def test_row_i_of_the_contexts_is_that_of_position_i(trained):
    stream, block = trained.stream("val"), trained.model.context_block
    contexts = stream.contexts()
    with torch.no_grad():
        inputs = project_inputs(block, trained.model.embed(stream.ids[:3]))
        context = torch.zeros(1, trained.model.config.context_dim)
        for position in range(3):
            context = block(context, inputs[position][None])
            torch.testing.assert_close(contexts[position], context[0], atol=1e-4, rtol=1e-4)
    assert len(contexts) == len(stream.token_losses())


def test_attention_weights_are_those_of_the_slots_that_there_are(trained):
    stream = trained.stream("train")
    last = len(stream) - 1
    for positions in (range(3), torch.tensor([last, 0])):
        weights = stream.attention(positions)
        sizes = trained.model.config
        assert weights.shape == (len(positions), sizes.num_heads, sizes.max_contexts)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:2]))


def test_a_split_or_a_position_that_is_not_there_is_refused(trained):
    with pytest.raises(UserError, match="split is 'validation'; allowed: train, val, test"):
        trained.stream("validation")
    last = len(trained.stream("val")) - 1
    for positions in ([], [0, last + 1], [-1], 3):
        with pytest.raises(UserError, match=f"allowed: a list of numbers from 0 to {last}"):
            trained.stream("val").logits(positions)


def test_parallel_passes_over_a_test_text_start_as_they_did_in_the_run(tiny_settings, tmp_path):
    """Few passes do not forget the contexts they start from, so another seed gives other losses."""
    few = {"phase1.validation_passes": 1, "runtime.seed": 7, "phase2.max_epochs": 1}
    finished = run(build_config("ci", "published", 8, tiny_settings | few), tmp_path / "run")
    losses = open_run(finished).stream("test").token_losses()
    assert losses.mean().exp().item() == pytest.approx(finished.summary["test"]["ppl"], rel=1e-6)


@pytest.mark.parametrize("recipe", ["exact", "published"])
def test_without_the_store_an_open_run_has_the_same_streams(tiny_settings, tmp_path, own_store, recipe):
    finished = run(build_config("ci", recipe, 8, tiny_settings), tmp_path / "run")
    before = open_run(finished).streams
    shutil.rmtree(own_store)
    after = open_run(tmp_path / "run").streams
    for split, stream in before.items():
        assert torch.equal(after[split].ids, stream.ids)
        assert torch.equal(after[split].contexts, stream.contexts)


def test_streams_of_conversations_that_have_changed_are_refused(tiny_settings, tmp_path, own_store):
    finished = run(build_config("ci", "exact", 8, tiny_settings), tmp_path / "run")
    file = tmp_path / "conversations.jsonl"
    file.write_text(file.read_text().replace("cat", "dog"))
    shutil.rmtree(own_store)
    opened = open_run(tmp_path / "run")
    for split in ("train", "val", "test"):
        with pytest.raises(UserError, match=r"conversations\.jsonl for .* are not those .* restore them"):
            opened.stream(split)
    assert opened.read("the cat").token_losses().isfinite().all()
    assert finished.summary["test"]["ppl"] > 1


def test_attention_reads_other_contexts_if_they_are_given(trained):
    stream, model = trained.stream("val"), trained.model
    shuffled = stream.contexts()[torch.randperm(len(stream), generator=torch.Generator().manual_seed(0))]
    nothing = torch.zeros_like(shuffled)

    def present_slot_alone(window):
        return torch.cat([window[:, :1], torch.zeros_like(window[:, 1:])], dim=1)

    at = torch.arange(len(stream))
    batch = model.batch(stream.stream, at)
    window, present = batch.inputs
    rows = model.window.rows(at)
    expected = {
        "own": (stream.contexts(), window),
        "shuffled": (shuffled, F.pad(shuffled, (0, 0, 1, 0))[rows].to(window)),
        "nothing": (nothing, torch.zeros_like(window)),
        "present slot alone": (present_slot_alone, present_slot_alone(window)),
    }
    for name, (contexts, read) in expected.items():
        with torch.no_grad():
            losses = model.scores(replace(batch, inputs=(read, present)))[0]
        torch.testing.assert_close(stream.token_losses(contexts), losses, msg=name)
        logits = stream.logits(at[:9], contexts)
        nats = F.cross_entropy(logits, batch.targets[:9], reduction="none")
        torch.testing.assert_close(nats, losses[:9], rtol=0, atol=0.005, msg=name)
    assert not torch.allclose(stream.token_losses(nothing), stream.token_losses(), atol=1e-4)


@pytest.mark.parametrize("contexts", [torch.zeros(3, 2), lambda window: window[0], lambda window: None])
def test_contexts_of_a_wrong_shape_are_refused(trained, contexts):
    with pytest.raises(UserError, match=r"^contexts are .+; allowed here: a tensor of shape \[\d+, "):
        trained.stream("val").token_losses(contexts)
