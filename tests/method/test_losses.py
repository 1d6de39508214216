import pytest
import torch
import torch.nn.functional as F

from ctxkv_lib.method import losses
from ctxkv_lib.method.losses import frozen_head_cross_entropy


@pytest.fixture(params=["_by_vocabulary", "_by_rows"])
def any_device(request, monkeypatch):
    """Make the test use the code for CPUs, and then the code for other devices, with small chunks."""
    monkeypatch.setattr(losses, "_by_vocabulary", getattr(losses, request.param))
    monkeypatch.setattr(losses, "VOCABULARY_CHUNK", 32)
    monkeypatch.setattr(losses, "CPU_ROWS", 5)


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
    found, asked = frozen_head_cross_entropy(hidden, table, targets, bias, read, repeat)
    (found * weights).sum().backward()

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(hidden.grad, wanted)
    assert asked.shape == (0,)
    for rows in (slice(None), slice(0)):  # without gradients: all positions, and none
        given = (hidden.detach()[rows], table, targets[rows], bias, None if read is None else read[rows])
        scores, correct = frozen_head_cross_entropy(*given, repeat)
        torch.testing.assert_close(scores, expected.detach()[rows])
        assert torch.equal(correct, (logits.argmax(dim=1) == targets)[rows])


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


@pytest.mark.parametrize("size", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [-1000.0, 30.0, 1000.0])
def test_logits_of_any_size_neither_overflow_nor_vanish(any_device, size, level):
    """The bias adds `level` to all logits, and the logits of position 3 get it twice."""
    torch.manual_seed(0)
    hidden, table, bias = torch.randn(20, 8), torch.randn(97, 8).to(size), torch.full((97,), level)
    table[:, 0], hidden[3, 0] = 1, level
    hidden, targets = hidden.to(size).float().requires_grad_(), torch.randint(0, 97, (20,))
    logits = F.linear(hidden, table.float(), bias)
    expected = F.cross_entropy(logits, targets, reduction="none")
    expected.sum().backward()
    wanted, hidden.grad = hidden.grad, None
    found, _ = frozen_head_cross_entropy(hidden, table, targets, bias)
    found.sum().backward()
    rounding = 1e-4 if size == torch.float32 else 2**-8 * logits.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)
    if size == torch.float32:
        torch.testing.assert_close(hidden.grad, wanted, rtol=0, atol=1e-4)


def test_bf16_exponentials_are_as_precise_as_the_docstring_says():
    torch.manual_seed(0)
    table, targets = torch.randn(5000, 64).bfloat16(), torch.randint(0, 5000, (2000,))
    hidden = torch.randn(2000, 64).bfloat16()
    target_logits = (hidden.float() * table[targets]).sum(dim=1)
    assert target_logits.mean().round() == 0  # this constant is subtracted before logits are rounded
    expected = F.linear(hidden, table).float().logsumexp(dim=1) - target_logits
    error = frozen_head_cross_entropy(hidden.float(), table, targets)[0] - expected
    assert error.abs().max() < 0.004
    assert error.mean().abs() < 1e-4


def test_second_derivatives_are_refused(any_device):
    hidden = torch.randn(3, 8, requires_grad=True)
    loss = frozen_head_cross_entropy(hidden, torch.randn(5, 8), torch.tensor([0, 4, 1]))[0].sum()
    with pytest.raises(NotImplementedError, match="no second derivative; use cross_entropy on the logits"):
        torch.autograd.grad(loss, hidden, create_graph=True)
