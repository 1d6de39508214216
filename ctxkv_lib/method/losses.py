"""Cross-entropy with a frozen output head, computed without holding all logits in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VOCABULARY_CHUNK = 2048  # table rows per chunk on a CPU, so that a batch's logits fit in the CPU's cache
LEAST_LOG_SHARE = -80.0  # lower limit of log-probabilities before exp; float32 is denormal below exp(-87)
LARGEST_EXPONENT = 60  # limit for |log| of a sum of exponentials; exp overflows float32 and bfloat16 at 88
# Positions per chunk when the logits of the whole vocabulary are computed. A chunk takes 100 MiB on a CPU,
# and 1 GiB on other devices, where larger chunks need fewer kernel launches.
CPU_ROWS, GPU_ROWS = 512, 2048

# Three results: losses `[n]`; whether each prediction is correct, `[n]` (empty if averages are requested);
# and, if requested, averages of the table's rows weighted by softmax, `[n, hidden_size]`.
Outcome = tuple[Tensor, Tensor, Tensor | None]
# The arguments `table`, `bias`, `read` and `token_bias` of `frozen_head_cross_entropy`.
Head = tuple[Tensor, Tensor | None, Tensor | None, float]


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Compute the loss and, in the same pass, its gradient with respect to the hidden state.

    Because the table is frozen, d loss / d hidden = softmax(hidden @ table.T) @ table - table[target].
    Biases of the logits change the softmax but not this formula.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        compute = _by_vocabulary if hidden.device.type == "cpu" else _by_rows
        losses, correct, average = compute(hidden, targets, head, ctx.needs_input_grad[0])
        if average is not None:
            ctx.save_for_backward(average.sub_(head[0][targets]))
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # With create_graph=True, autograd would treat the saved tensor as a constant.
        if torch.is_grad_enabled():
            raise NotImplementedError("This loss has no second derivative; use cross_entropy on the logits.")
        (hidden_gradient,) = ctx.saved_tensors
        return gradients[0][:, None] * hidden_gradient, None, None


def _by_vocabulary(hidden: Tensor, targets: Tensor, head: Head, wants_averages: bool) -> Outcome:
    """Compute the loss from logits over one chunk of the vocabulary at a time.

    Let l[v] be the logit of token v, and c any number. For each position::

        total = sum over v of exp(l[v] - c)
        loss = log(total) - (l[target] - c)
        average row = (sum over v of exp(l[v] - c) * table[v]) / total

    Both sums are accumulated chunk by chunk. The number c keeps exponentials in range: it is the mean of the
    target logits, and is subtracted at no cost through the bias of the matrix product. It is rounded to a
    whole number so that biases stay exact. If logits are too far apart for any c, `_by_rows` is used instead.
    """
    table, bias, read, token_bias = head
    queries, places = hidden.to(table.dtype), torch.arange(len(hidden))
    if bias is None:
        bias = table.new_zeros(len(table))
    target_logit = (queries.to(hidden.dtype) * table[targets]).sum(dim=1)
    shifted = bias - (target_logit + bias[targets]).mean().round()
    target_logit += shifted[targets]  # subtract c, as from all logits below
    if read is not None:
        target_logit += token_bias * (read == targets)
    total = torch.zeros_like(target_logit)
    # Exponentials of the target logits and of the largest logits; empty if averages are requested.
    target_exponential = peak = total[:0] if wants_averages else total
    average = torch.zeros_like(hidden) if wants_averages else None
    for start in range(0, len(table), VOCABULARY_CHUNK):
        chunk = slice(start, start + VOCABULARY_CHUNK)
        rows = table[chunk]
        exponentials = F.linear(queries, rows, shifted[chunk])  # (n, chunk); still logits here
        if read is not None:
            column, inside = _column(read - start, len(rows))
            exponentials[places, column] += token_bias * inside  # bfloat16 `scatter_add_` is slow
        exponentials.exp_()
        total = total + exponentials.sum(dim=1, dtype=hidden.dtype)
        if average is not None:
            average += exponentials @ rows
        else:
            column, inside = _column(targets - start, len(rows))
            candidate = exponentials[places, column].to(hidden.dtype)
            target_exponential = torch.where(inside, candidate, target_exponential)
            peak = torch.maximum(peak, exponentials.amax(dim=1).to(hidden.dtype))
    log_total = total.log()
    if not (log_total.abs() < LARGEST_EXPONENT).all():  # also true for NaN
        return _by_rows(hidden, targets, head, wants_averages)
    if average is not None:
        average /= total[:, None]
    return log_total - target_logit, target_exponential == peak, average


def _column(columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return `columns` clamped to a chunk, int64 `[n]`, and which columns were inside, bool `[n]`."""
    return columns.long().clamp(0, width - 1), (columns >= 0) & (columns < width)


def _by_rows(hidden: Tensor, targets: Tensor, head: Head, wants_averages: bool) -> Outcome:
    """Compute the loss from logits over the whole vocabulary, one chunk of positions at a time."""
    table, bias, read, token_bias = head
    on_cpu, parts = hidden.device.type == "cpu", []
    size = CPU_ROWS if on_cpu else GPU_ROWS
    for start in range(0, max(1, len(hidden)), size):
        chunk = slice(start, start + size)
        column = targets[chunk, None]
        logits = F.linear(hidden[chunk].to(table.dtype), table, bias)  # (n, vocab_size)
        if read is not None:
            add_to_logit(logits, read[chunk], token_bias)
        correct = targets.new_empty(0, dtype=torch.bool)
        if not wants_averages:
            correct = logits.gather(1, column)[:, 0] == logits.amax(dim=1)
        log_shares = logits.log_softmax(dim=1, dtype=hidden.dtype)
        losses = -log_shares.gather(1, column)[:, 0]
        # On a CPU, denormal numbers make matrix products ten times slower.
        if on_cpu:
            log_shares.clamp_(min=LEAST_LOG_SHARE)
        average = (log_shares.exp_().to(table.dtype) @ table).to(hidden.dtype) if wants_averages else None
        parts.append((losses, correct, average))
    all_losses, all_correct, all_averages = zip(*parts, strict=True)
    return torch.cat(all_losses), torch.cat(all_correct), torch.cat(all_averages) if wants_averages else None


def add_to_logit(logits: Tensor, columns: Tensor, number: float) -> None:
    """Add `number` in place to one logit in each row; `columns` (integers, `[...]`) are their columns."""
    column = columns.long()[..., None]
    logits.scatter_add_(-1, column, logits.new_full((1,), number).expand_as(column))


def frozen_head_cross_entropy(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    read: Tensor | None = None,
    token_bias: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute the loss and correctness of each prediction from the logits `hidden @ table.T + bias`.

    Args:
        hidden: float `[n, hidden_size]`, the only argument that gets a gradient.
        table: float `[vocab_size, hidden_size]`; matrix products use its dtype. With a bfloat16 table and a
            float32 `hidden`, sums over the vocabulary are float32. On a CPU, the exponentials of logits are
            then rounded to bfloat16. This changes the loss of a token by at most 0.004 nats, and by less
            than 0.0001 nats on average.
        targets: int64 `[n]`.
        bias: float `[vocab_size]`, also frozen; converted to the table's dtype.
        read: integers `[n]`, the current tokens. `token_bias` is added to their logits; None adds nothing.

    Returns:
        Losses in nats, float `[n]`, and correctness, bool `[n]`: True if no logit is larger than the
        target's. If `hidden` needs a gradient, correctness is empty, `[0]`, to save a pass over the logits.
    """
    bias = None if bias is None else bias.to(table.dtype)
    head = table, bias, read if token_bias else None, token_bias
    return _FrozenHeadCrossEntropy.apply(hidden, targets, head)
