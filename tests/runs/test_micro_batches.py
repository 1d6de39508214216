"""Micro-batches have the gradients and the dropout of the whole batch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_method, tiny_stream

from ctxkv_lib.method.phase2 import batch_gradients
from ctxkv_lib.runs.micro_batches import summed

STREAM = tiny_stream(60)


@pytest.mark.parametrize("micro_batches", [1, 3, 41])
def test_micro_batches_have_the_gradients_of_the_mean_loss(micro_batches):
    """AdamW hardly minds a gradient's scale, so this looks at the gradients, and at the next draws."""
    found = []
    for whole in (True, False):
        model = tiny_method(attention_dropout=0.5).train()
        batch = STREAM.gather(torch.arange(40), model.window)
        torch.manual_seed(7)
        if whole:
            hidden, _ = batch.attend(model)
            F.cross_entropy(model.logits(hidden, batch.tokens), batch.targets).backward()
        else:
            work = partial(batch_gradients, model, model.wte.weight.detach(), 40)
            summed(work, batch, 40, slice(0, 40), micro_batches)
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        found.append({**gradients, "draws": torch.rand(3)})
    expected, cut = found
    for name, gradient in expected.items():
        torch.testing.assert_close(cut[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert {name.split(".")[0] for name, g in cut.items() if g is not None} == {
        "attention",
        "feed_forward",
        "draws",
    }
