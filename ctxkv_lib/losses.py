"""Cross-entropy through a frozen output table, without ever holding the full logits."""

from typing import Any

import torch
from torch import Tensor

VOCABULARY_CHUNK = 2048  # rows of the table at a time: a batch's chunk of logits stays in the CPU's cache


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Online softmax over chunks of the vocabulary; the hidden state's gradient is made on the way.

    With the table frozen, d loss / d hidden = softmax(hidden @ table.T) @ table - table[target]. The first
    term is a running average of table rows, rescaled whenever a larger logit appears.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        peak = hidden.new_full((count,), -torch.inf)
        total = hidden.new_zeros(count)
        best = torch.zeros_like(targets)
        needs_gradient = ctx.needs_input_grad[0]
        average = torch.zeros_like(hidden) if needs_gradient else None
        for start in range(0, table.shape[0], VOCABULARY_CHUNK):
            rows = table[start : start + VOCABULARY_CHUNK]
            logits = hidden @ rows.T  # (count, chunk)
            chunk_peak, chunk_best = logits.max(dim=1)
            best = torch.where(chunk_peak > peak, chunk_best + start, best)
            new_peak = torch.maximum(peak, chunk_peak)
            shrink = (peak - new_peak).exp_()
            weights = logits.sub_(new_peak[:, None]).exp_()
            total.mul_(shrink).add_(weights.sum(dim=1))
            if average is not None:
                average.mul_(shrink[:, None]).addmm_(weights, rows)
            peak = new_peak
        target_rows = table[targets]  # (count, hidden_size)
        losses = total.log().add_(peak).sub_((hidden * target_rows).sum(dim=1))
        if average is not None:
            ctx.save_for_backward(average.div_(total[:, None]).sub_(target_rows))
        correct = best == targets
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (hidden_gradient,) = ctx.saved_tensors
        return gradients[0][:, None] * hidden_gradient, None, None


def frozen_head_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token loss and accuracy of `hidden @ table.T`; differentiable in `hidden` only.

    Args:
        hidden: float `[n, hidden_size]`.
        table: float `[vocab_size, hidden_size]`; gets no gradient.
        targets: int64 `[n]`.

    Returns:
        losses float `[n]` in nats, and correct bool `[n]` (the largest logit is the target's).
    """
    return _FrozenHeadCrossEntropy.apply(hidden, table, targets)
