"""What a finished run shows of its inside."""

import pytest
import torch
import torch.nn.functional as F

from ctxkv_lib.errors import UserError


def test_losses_of_tokens_have_the_perplexity_of_the_summary_and_are_those_of_the_logits(trained):
    losses = trained.token_losses("val")
    assert losses.mean().exp().item() == pytest.approx(trained.run.summary["phase2"]["val_ppl"], rel=1e-5)
    positions = [len(losses) - 1, 0, 20]
    targets = torch.stack([trained.caches["val"].ids[i + 1] for i in positions]).long()
    nats = F.cross_entropy(trained.logits("val", positions), targets, reduction="none")
    torch.testing.assert_close(nats, losses[positions], rtol=0, atol=0.005)


def test_row_i_of_the_contexts_is_that_of_position_i(trained):
    contexts, block = trained.contexts("val"), trained.model.context_block
    with torch.no_grad():
        inputs = block.project_inputs(trained.model.embed(trained.caches["val"].ids[:3]))
        context = torch.zeros(1, trained.model.config.context_dim)
        for position in range(3):
            context = block(context, inputs[position][None])
            torch.testing.assert_close(contexts[position], context[0], atol=1e-4, rtol=1e-4)
    assert len(contexts) == len(trained.token_losses("val"))


def test_attention_weights_are_those_of_the_slots_that_there_are(trained):
    last = len(trained.token_losses("train")) - 1
    for positions in (range(3), torch.tensor([last, 0])):
        weights = trained.attention("train", positions)
        sizes = trained.model.config
        assert weights.shape == (len(positions), sizes.num_heads, sizes.max_contexts)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:2]))


def test_a_split_or_a_position_that_is_not_there_is_refused(trained):
    with pytest.raises(UserError, match="split is 'validation'; allowed: train, val"):
        trained.contexts("validation")
    last = len(trained.token_losses("val")) - 1
    for positions in ([], [0, last + 1], [-1], 3):
        with pytest.raises(UserError, match=f"allowed: a list of some from 0 to {last}"):
            trained.logits("val", positions)
