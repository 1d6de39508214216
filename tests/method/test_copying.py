"""Copying equals its definition, computed term by term."""

import pytest
import torch
from conftest import tiny_method, tiny_stream

from ctxkv_lib.method.copying import Copying, mix
from ctxkv_lib.method.scoring import token_scores
from ctxkv_lib.method.streams import Stream


def model_that_copies(weight, sharpness):
    model = tiny_method().eval()
    model.layer.copying = Copying(weight, sharpness)
    return model


def mixture(model, stream, position, weight, sharpness):
    """Return the probabilities of the next token at one position, computed from the definition."""
    hidden, _ = model.read(model.batch(stream, torch.tensor([position])))
    found = model.logits(hidden, stream.ids[[position]])[0].softmax(dim=0)
    contexts = stream.contexts[1:]
    votes = {
        earlier: (sharpness * torch.cosine_similarity(contexts[position], contexts[earlier], dim=0)).exp()
        for earlier in range(max(0, position - model.window.offsets[-1]), position)
    }
    if votes:
        found = (1 - weight) * found
        for earlier, vote in votes.items():
            found[stream.ids[earlier + 1]] += weight * vote / sum(votes.values())
    return found


@pytest.mark.parametrize(("weight", "sharpness"), [(0.3, 4.0), (0.9, 0.0)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_scores_equal_those_of_the_mixture(weight, sharpness, shuffled):
    model, stream = model_that_copies(weight, sharpness), tiny_stream(40)
    stream = Stream(stream.ids % 7, stream.contexts)  # tokens that repeat
    generator = torch.Generator().manual_seed(0)
    positions = torch.randperm(40, generator=generator) if shuffled else torch.arange(40)
    losses, correct = token_scores(model, stream, positions)
    assert 0 < correct.sum() < 40
    for position, loss, is_correct in zip(positions.tolist(), losses, correct, strict=True):
        expected = mixture(model, stream, position, weight, sharpness)
        target = int(stream.ids[position + 1])
        torch.testing.assert_close(loss, -expected[target].log())
        assert is_correct == (expected.argmax() == target)


def test_a_mixture_sums_to_one_and_is_computed_in_fp32():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=generator)
    shares = 0.3 * torch.randn(5, 4, generator=generator).softmax(dim=-1)
    tokens = torch.randint(11, (5, 4), generator=generator)
    torch.testing.assert_close(mix(logits, tokens, shares).exp().sum(dim=-1), torch.ones(5))
    rounded = logits.bfloat16()
    assert torch.equal(mix(rounded, tokens, shares), mix(rounded.float(), tokens, shares).bfloat16())
