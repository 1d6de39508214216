"""Contexts of a batch of texts, which may be long and padded, by one segmented scan."""

import torch
from torch import Tensor

from ..method.contexts import Block, Stream, segmented_scan

ROUNDINGS = 16  # smallest tolerance of a batch, in `eps` of its dtype: half precision cannot reach 1e-5


@torch.no_grad()
def scan_rows(
    block: Block, projected_inputs: Tensor, tokens: Tensor, read: Tensor, state: Tensor, tolerance: float
) -> Tensor:
    """Compute the contexts of a batch by one segmented scan of all its rows.

    Args:
        projected_inputs: input projections of distinct tokens, `[num_distinct, context_dim]`.
        tokens: int64 `[batch, length]`, rows of `projected_inputs`.
        read: bool `[batch, length]`; a column that is not read leaves the context as it is.
        state: contexts before the first column, `[batch, context_dim]`.
        tolerance: largest error of a component; in half precision, some roundings.

    Returns:
        contexts after each column, `[batch, length, context_dim]`.
    """
    row = read.nonzero()[:, 0]  # of each token that is read, one row after another
    begins = row.where(row.diff(prepend=row.new_tensor([-1])) > 0, -1)
    contexts = torch.cat([state.new_empty(len(row) + 1, state.shape[1]), state])
    contexts[0] = state[0]
    tolerance = max(tolerance, ROUNDINGS * torch.finfo(state.dtype).eps)
    stream = Stream(block, projected_inputs, tokens[read], begins, state)
    segmented_scan(stream, contexts[: len(row) + 1], tolerance)
    seen = read.cumsum(dim=1)
    before = seen[:, -1:].cumsum(dim=0) - seen[:, -1:]  # tokens read of the rows above, (batch, 1)
    unchanged = len(row) + 1 + torch.arange(len(state), device=state.device)[:, None]
    return contexts[torch.where(seen > 0, before + seen, unchanged)]
