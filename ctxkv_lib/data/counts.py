"""How often tokens occur in a stream."""

import torch
from torch import Tensor

AT_ONCE = 2**20  # tokens, to bound the memory of their widened ids: streams are uint16, mapped, of any length


def count_tokens(ids: Tensor, size: int = 0) -> Tensor:
    """How often each id of `ids` `[n]` occurs: int64, of length `size` or more, if an id needs it."""
    counts = torch.zeros(size, dtype=torch.int64)
    for part in ids.split(AT_ONCE):
        found = torch.bincount(part.int(), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return counts
