"""How often tokens occur in a stream, and their smoothed frequencies."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AT_ONCE = 2**20  # tokens, to bound the memory of their widened ids: streams are uint16, mapped, of any length
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # where the formula gives none; as KenLM's --discount_fallback


def count_tokens(ids: Tensor, size: int) -> Tensor:
    """Count each id of `ids` `[n]`, all below `size`: int64 `[size]`."""
    counts = torch.zeros(size, dtype=torch.int64)
    for part in ids.split(AT_ONCE):
        counts += torch.bincount(part.int(), minlength=size)
    return counts


def discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Estimate what is taken off counts of 0 (nothing), 1, 2 and 3 or more: float64 `[4]`.

    Reference: modified Kneser-Ney smoothing, Chen and Goodman, "An empirical study of smoothing techniques
    for language modeling" (TR-10-98, 1998).
    """
    n1, n2, n3, n4 = (np.count_nonzero(counts == n) for n in (1, 2, 3, 4))
    if min(n1, n2, n3) > 0:
        share = n1 / (n1 + 2 * n2)
        found = (1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3)
        if all(0 <= taken <= count for count, taken in enumerate(found, start=1)):
            return np.array([0, *found])
    return np.array([0, *FALLBACK_DISCOUNTS])


def unigram_floor(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Turn counts int64 `[vocab_size]` into probabilities, discounted towards the uniform distribution."""
    taken = discounts(counts)[np.minimum(counts, 3)]
    total = max(counts.sum(), 1)
    kept = taken.cumsum()[-1] / total if counts.any() else 1.0  # summed one by one, as bincount does
    return (counts - taken) / total + kept / len(counts)
