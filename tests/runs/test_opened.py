"""Tests of what an open run shows about its own streams and about new text."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ctxkv_lib.errors import UserError
from ctxkv_lib.measure.other_text import evaluate_texts
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
        inputs = block.project_inputs(trained.model.embed(stream.ids[:3]))
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
