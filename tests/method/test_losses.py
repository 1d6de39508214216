import pytest
import torch
import torch.nn.functional as F

from ctxkv_lib.method import losses
from ctxkv_lib.method.losses import frozen_head_cross_entropy


@pytest.fixture(params=["_by_vocabulary", "_by_rows"])
def any_device(request, monkeypatch):
    """Compute as on a CPU, or as on any other device; in chunks of both."""
    monkeypatch.setattr(losses, "_by_vocabulary", getattr(losses, request.param))
    monkeypatch.setattr(losses, "VOCABULARY_CHUNK", 32)
    monkeypatch.setattr(losses, "BATCH_ROWS", 5)


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 97])
@pytest.mark.parametrize("scale", [1.0, 60.0])
@pytest.mark.parametrize("added", [False, True])
def test_values_and_gradients_equal_cross_entropy(any_device, vocabulary, scale, added):
    torch.manual_seed(vocabulary)
    hidden = (torch.randn(13, 8, dtype=torch.float64) * scale).requires_grad_()
    table = torch.randn(vocabulary, 8, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (13,))
    weights = torch.rand(13, dtype=torch.float64)
    bias, read, repeat = None, None, 0.0
    logits = hidden @ table.T
    if added:
        bias, repeat = torch.randn(vocabulary, dtype=torch.float64) * scale, -3.0
        read = torch.randint(0, vocabulary, (13,), dtype=torch.int32)
        logits = logits + bias + repeat * F.one_hot(read.long(), vocabulary)
    expected = F.cross_entropy(logits, targets, reduction="none")
    (expected * weights).sum().backward()
    wanted, hidden.grad = hidden.grad, None
    found, correct = frozen_head_cross_entropy(hidden, table, targets, bias, read, repeat)
    (found * weights).sum().backward()

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(hidden.grad, wanted)
    assert torch.equal(correct, logits.argmax(dim=1) == targets)
    assert not correct.requires_grad
    for rows in (slice(None), slice(0)):  # without a gradient; and no positions at all
        given = (hidden.detach()[rows], table, targets[rows], bias, None if read is None else read[rows])
        torch.testing.assert_close(frozen_head_cross_entropy(*given, repeat)[0], expected.detach()[rows])


def test_bf16_products_are_summed_in_fp32(any_device):
    torch.manual_seed(0)
    table, bias, targets = torch.randn(97, 64), torch.randn(97), torch.randint(0, 97, (200,))
    hidden = torch.randn(200, 64, requires_grad=True)
    frozen_head_cross_entropy(hidden, table, targets, bias)[0].sum().backward()
    wanted, hidden.grad = hidden.grad, None
    found, _ = frozen_head_cross_entropy(hidden, table.bfloat16(), targets, bias)
    found.sum().backward()
    expected = F.cross_entropy(hidden @ table.T + bias, targets, reduction="none")
    assert found.dtype == hidden.grad.dtype == torch.float32
    assert (found - expected).mean().abs() < 0.01
    assert (hidden.grad - wanted).norm() < 0.01 * wanted.norm()


def test_second_derivatives_are_refused(any_device):
    hidden = torch.randn(3, 8, requires_grad=True)
    loss = frozen_head_cross_entropy(hidden, torch.randn(5, 8), torch.tensor([0, 4, 1]))[0].sum()
    with pytest.raises(NotImplementedError, match="no second derivative; take cross_entropy of the logits"):
        torch.autograd.grad(loss, hidden, create_graph=True)
