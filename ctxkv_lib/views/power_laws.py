"""Power laws: perplexity against training tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEAST_SIZES = 3  # sample counts that a power law is fitted to; any two lie on one
SPLITS = {"val_ppl": "Validation", "test_ppl": "Test"}  # as figures name them


def power_laws(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Fit a power law to each split of each variant that has enough sizes.

    Args:
        rows: of a sweep.

    Returns:
        `variant`, and by split what `power_law` returns.
    """
    found = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        points = {
            split: [(r["train_tokens"], value) for r in rows if r["variant"] == name for value in r[split]]
            for split in SPLITS
        }
        if laws := {split: law for split in SPLITS if (law := power_law(points[split]))}:
            found.append({"variant": name, **laws})
    return found


def power_law(points: Sequence[tuple[int, float]]) -> dict[str, float] | None:
    """Fit log PPL on log tokens by least squares to the training tokens and PPL of runs.

    Returns:
        `factor` and `exponent` of PPL = factor * tokens^-exponent, and `error`, the largest relative distance
        of a size's geometric mean from that; None with fewer than `LEAST_SIZES` sizes.
    """
    if len({tokens for tokens, _ in points}) < LEAST_SIZES:
        return None
    tokens, ppls = np.log(np.array(points, dtype=np.float64)).T
    slope, intercept = np.polyfit(tokens, ppls, 1)
    off = [ppls[tokens == size].mean() - slope * size - intercept for size in np.unique(tokens)]
    error = float(np.abs(np.expm1(off)).max())
    return {"factor": float(np.exp(intercept)), "exponent": float(-slope), "error": error}
