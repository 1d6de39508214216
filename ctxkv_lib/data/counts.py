"""What is counted in a stream of tokens, a part at a time: streams are uint16, mapped, and of any length."""

import math

import torch
from torch import Tensor

AT_ONCE = 2**20  # tokens, to bound the memory of their widened ids


def count_tokens(ids: Tensor, size: int = 0) -> Tensor:
    """How often each id of `ids` `[n]` occurs: int64, of length `size` or more, if an id needs it."""
    counts = torch.zeros(size, dtype=torch.int64)
    for part in ids.split(AT_ONCE):
        found = torch.bincount(part.int(), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return counts


def repeat_logit(ids: Tensor) -> float:
    """Log of how many tokens of `ids` `[n]` follow themselves, as a share of what chance would give.

    Chance has the same tokens in any order. 1 is added to both numbers, so that there is a logarithm.
    """
    chance = (len(ids) - 1) * (count_tokens(ids).double() / len(ids)).square().sum().item()
    pairs = zip(ids[:-1].split(AT_ONCE), ids[1:].split(AT_ONCE), strict=True)
    repeats = sum(int((earlier.int() == later.int()).sum()) for earlier, later in pairs)
    return math.log((repeats + 1) / (chance + 1))
