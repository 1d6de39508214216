"""Estimate discounts for modified Kneser-Ney smoothing of token frequencies and n-gram baselines.

Reference: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (TR-10-98,
1998).
"""

import numpy as np
from numpy.typing import NDArray

# Discounts where the formula is undefined. They are the defaults of KenLM's option --discount_fallback.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


def discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Estimate the discounts for counts of 0 (no discount), 1, 2, and 3 or more. Returns float64 `[4]`."""
    n1, n2, n3, n4 = (np.count_nonzero(counts == n) for n in (1, 2, 3, 4))
    if min(n1, n2, n3) > 0:
        share = n1 / (n1 + 2 * n2)
        estimates = (1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3)
        if all(0 <= discount <= count for count, discount in enumerate(estimates, start=1)):
            return np.array([0, *estimates])
    return np.array([0, *FALLBACK_DISCOUNTS])


def smoothed_unigram(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Turn token counts, int64 `[vocab_size]`, into probabilities smoothed with the uniform distribution."""
    taken, total = discounts(counts)[np.minimum(counts, 3)], counts.sum()
    # `cumsum` adds the numbers one at a time and in order, like `bincount`, so both round identically.
    kept = taken.cumsum()[-1] / total
    return (counts - taken) / total + kept / len(counts)
