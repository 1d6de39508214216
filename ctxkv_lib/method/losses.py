"""Cross-entropy through a frozen output table, without holding all logits at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of the table at a time: a CPU keeps a batch's chunk of logits in its cache, a GPU wants few launches.
VOCABULARY_CHUNK = {"cpu": 2048}
MANY_WORDS = 16_384  # on any other device


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Softmax over chunks of the vocabulary, which computes the gradient of the hidden state on the way.

    With the table frozen, d loss / d hidden = softmax(hidden @ table.T) @ table - table[target]. The first
    term is an average of table rows: the chunks' own averages, weighted by the chunks' sums of exponentials.
    Biases of logits change the softmax and no formula.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        read: Tensor | None,
        token_bias: float,
    ) -> tuple[Tensor, Tensor]:
        queries = hidden.to(table.dtype)
        bias = None if bias is None else bias.to(table.dtype)
        log_sum = hidden.new_full((len(hidden),), -torch.inf)  # log of the sum of exponentials so far
        peak = target_logit = log_sum
        average = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        chunk = VOCABULARY_CHUNK.get(hidden.device.type, MANY_WORDS)
        for start in range(0, table.shape[0], chunk):
            rows = table[start : start + chunk]
            logits = F.linear(
                queries, rows, bias if bias is None else bias[start : start + chunk]
            )  # (n, chunk)
            if read is not None and token_bias:
                add_to_logit(logits, read - start, token_bias)
            column = targets - start
            found = logits.gather(1, column.clamp(0, len(rows) - 1)[:, None]).squeeze(1).to(hidden.dtype)
            target_logit = torch.where((column >= 0) & (column < len(rows)), found, target_logit)
            top = logits.amax(dim=1).to(hidden.dtype)
            peak = torch.maximum(peak, top)
            shares = logits.softmax(dim=1)
            chunk_log_sum = top - shares.amax(dim=1).to(hidden.dtype).log()
            both = torch.logaddexp(log_sum, chunk_log_sum)
            if average is not None:
                average.mul_((log_sum - both).exp_()[:, None])
                average.addcmul_((shares @ rows).to(hidden.dtype), (chunk_log_sum - both).exp_()[:, None])
            log_sum = both
        if average is not None:
            ctx.save_for_backward(average.sub_(table[targets]))
        losses, correct = log_sum - target_logit, target_logit == peak
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_gradient,) = ctx.saved_tensors
        return gradients[0][:, None] * hidden_gradient, None, None, None, None, None


def add_to_logit(logits: Tensor, columns: Tensor, number: float) -> None:
    """Add a number, in place, to one logit of each row `[..., n]`, where there is such a column.

    Args:
        columns: integers `[...]`, on the logits' device.
    """
    width = logits.shape[-1]
    inside = (columns >= 0) & (columns < width)
    added = inside[..., None].to(logits.dtype) * number
    logits.scatter_add_(-1, columns.long().clamp(0, width - 1)[..., None], added)


def frozen_head_cross_entropy(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    read: Tensor | None = None,
    token_bias: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute next-token loss and accuracy of `hidden @ table.T + bias`, differentiable in `hidden` only.

    Args:
        hidden: float `[n, hidden_size]`.
        table: float `[vocab_size, hidden_size]`; gets no gradient. Its dtype is that of the matrix products.
            With bfloat16 and a float32 `hidden`, sums over the vocabulary are float32, but the normaliser of
            each chunk goes through a bfloat16 softmax: at most 0.003 nats at one token, no bias on average.
        targets: int64 `[n]`.
        bias: float `[vocab_size]`, also frozen; taken in the table's dtype.
        read: integers `[n]`, the current tokens, whose logits get `token_bias` added; None adds nothing.

    Returns:
        losses float `[n]` in nats, and correct bool `[n]` (no logit is larger than the target's).
    """
    return _FrozenHeadCrossEntropy.apply(hidden, table, targets, bias, read, token_bias)
