import pytest
import torch
from conftest import tiny_method, tiny_stream
from ctxkv_lib.hf.copying_streams import as_served

from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.copying import Copies, Copying, mix, mix_losses
from ctxkv_lib.method.evaluation import token_scores


def model_that_copies(weight, sharpness):
    model = tiny_method().eval()
    model.attention.copying = Copying(weight, sharpness)
    return model


def mixture(model, stream, position, begin, weight, sharpness):
    """The probabilities of the next token at one position, term by term."""
    hidden, _ = stream.attend(model, torch.tensor([position]))
    found = model.logits(hidden, stream.ids[[position]])[0].softmax(dim=0)
    first = max(begin, position - model.window.offsets[-1])
    votes = {
        earlier: (
            sharpness
            * torch.cosine_similarity(stream.contexts[position + 1], stream.contexts[earlier + 1], dim=0)
        ).exp()
        for earlier in range(first, position)
    }
    if votes:
        found = (1 - weight) * found
        for earlier, vote in votes.items():
            found[stream.ids[earlier + 1]] += weight * vote / sum(votes.values())
    return found


@pytest.mark.parametrize(("weight", "sharpness"), [(0.3, 4.0), (0.9, 0.0)])
@pytest.mark.parametrize("apart", [False, True])
def test_scores_are_those_of_the_mixture(weight, sharpness, apart):
    model, stream = model_that_copies(weight, sharpness), tiny_stream(40)
    begins = torch.tensor([0] * 17 + [17] * 23)
    ids = stream.ids % 7  # tokens that come again
    stream = StreamCache(ids, stream.contexts, begins=begins if apart else None)
    positions = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    losses, correct = token_scores(model, as_served(model, stream), positions)
    assert 0 < correct.sum() < 40
    for position, loss, is_correct in zip(positions.tolist(), losses, correct, strict=True):
        expected = mixture(model, stream, position, int(begins[position]) * apart, weight, sharpness)
        target = int(stream.ids[position + 1])
        torch.testing.assert_close(loss, -expected[target].log())
        assert is_correct == (expected.argmax() == target)


def test_training_and_models_that_do_not_copy_read_a_stream_as_it_is():
    stream = tiny_stream(20)
    assert as_served(tiny_method(), stream) is stream


def test_copies_do_not_depend_on_how_many_positions_are_compared_at_once(monkeypatch):
    model, stream = model_that_copies(0.3, 4.0), tiny_stream(150)
    whole = as_served(model, stream).gather(torch.arange(150), model.window)
    for position in (0, 1, 63, 64, 149):
        one = as_served(model, stream).gather(torch.tensor([position]), model.window)
        torch.testing.assert_close(one.shares[0], whole.shares[position])
    assert whole.shares.sum(dim=1).tolist() == pytest.approx([0] + [0.3] * 149)
    assert torch.equal(whole.copied[20], stream.ids[20 - 8 : 21].flip(0))  # 9 tokens back at most
    few = StreamCache(stream.ids[:4], stream.contexts[:4].bfloat16())  # less than is in reach, rounded
    found = as_served(model, few).gather(torch.arange(3), model.window).shares
    torch.testing.assert_close(found, whole.shares[:3], atol=0.01, rtol=0)


@pytest.mark.parametrize("weight", [0.3, 1 - 1e-6])
def test_losses_are_mixed_as_logits_are(weight):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=generator, requires_grad=True)
    shares = weight * torch.randn(5, 4, generator=generator).softmax(dim=-1)
    shares[0] = 0  # nothing to copy
    copies = Copies(torch.randint(11, (5, 4), generator=generator), shares)
    found = mix(logits, copies)
    torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(5))
    for targets in torch.randint(11, (8, 5), generator=generator):
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        expected = -found.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(mix_losses(losses, targets, copies), expected)
    rounded = logits.detach().bfloat16()  # mixed in float32, and rounded again
    assert torch.equal(mix(rounded, copies), mix(rounded.float(), copies).bfloat16())
    found.sum().backward()
    assert logits.grad.isfinite().all()
    nearly_all = copies._replace(shares=shares / weight * (1 - 1e-9))  # 1 in float32
    assert mix(logits, nearly_all).isfinite().all()


def test_a_stream_of_copies_attends_as_the_plain_one_does():
    model, stream = model_that_copies(0.3, 4.0), tiny_stream(20)
    positions = torch.tensor([3, 17])
    found, expected = (each.attend(model, positions)[0] for each in (as_served(model, stream), stream))
    torch.testing.assert_close(found, expected)
