"""Rows of the study beside each other: by how much the test perplexity changes, with its interval."""

from collections import defaultdict
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import continuous_cache
import numpy as np
from intervals import Losses, difference, losses, speaker_groups, test_tokens
from scaling import CACHED, COPIED, COUNTED, WITH_TABLE, read_lines, training_tokens

Change = tuple[float, float, float]  # per cent, and its interval
Pair = tuple[str, str]

BESIDE_NGRAMS: tuple[Pair, ...] = (("tuned", COUNTED), ("tuned", WITH_TABLE), (CACHED, WITH_TABLE))
OF_COPYING: tuple[Pair, ...] = (
    (COPIED, "tuned"),
    (COPIED, CACHED),
    (COPIED, COUNTED),
    (COPIED, WITH_TABLE),
)
NONE, SLOTS, LAST, ALL = "no contexts", "tokens at the same slots", "last 32 tokens", "all 640 tokens"
WITH_TOKENS, WITH_STATES = "the GRU with four caches", "the GRU with a continuous cache"
COPIES, COPIES_TOO = "contexts with copying", "contexts with copying and four caches"
GATED, GATED_COPIES = "gated contexts", "gated contexts with copying"
GATED_TOO, GATED_STATES = (
    "gated contexts with copying and four caches",
    "gated contexts with a continuous cache",
)
OF_FAIR = {  # names of the runs of `fair`: variant, and kind of cache, as `continuous_cache.found` has them
    "contexts": ("contexts", "model"),
    COPIES: ("contexts", "copying"),
    "the GRU": ("GRU", "model"),
    COPIES_TOO: ("contexts", "copying and four caches"),
    WITH_TOKENS: ("GRU", "four caches"),
    WITH_STATES: ("GRU", "continuous cache"),
    GATED: ("gated, end to end", "model"),
    GATED_COPIES: ("gated, end to end", "copying"),
    GATED_TOO: ("gated, end to end", "copying and four caches"),
    GATED_STATES: ("gated, end to end", "continuous cache"),
}
BESIDE_TOKENS: tuple[Pair, ...] = (
    ("contexts", NONE),
    ("contexts", SLOTS),
    ("contexts", LAST),
    ("contexts", ALL),
    (LAST, SLOTS),
    (LAST, ALL),
)
BESIDE_THE_GRU: tuple[Pair, ...] = (
    ("the GRU", "contexts"),
    (COPIES, "the GRU"),
    (WITH_TOKENS, COPIES),
    (WITH_TOKENS, COPIES_TOO),
    (WITH_STATES, COPIES),
    (WITH_STATES, WITH_TOKENS),
)
OF_GATED: tuple[Pair, ...] = (
    (GATED, "contexts"),
    (GATED, "the GRU"),
    (GATED_COPIES, "the GRU"),
    (WITH_STATES, GATED_COPIES),
    (GATED_TOO, WITH_TOKENS),
    (GATED_STATES, WITH_STATES),
    (WITH_STATES, GATED_TOO),
)


def changes(pairs: Sequence[Pair]) -> dict[Pair, dict[int, Change]]:
    """Compare rows of `answer`, `full` and `cache` on ten test conversations: by pair and sample count."""
    lines, tokens = read_lines(), test_tokens(10)
    return {
        (own, other): {
            count: difference(lines[own][size], lines[other][size], tokens)
            for count, size in sorted(training_tokens().items())
            if size in lines[own] and size in lines[other]
        }
        for own, other in pairs
    }


def fair_losses() -> dict[int, dict[str, Losses]]:
    """Read the losses of the runs of `fair` on the fifty test conversations, by sample count and name."""
    found: dict[int, dict[str, Any]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(continuous_cache.found("fair"), key=itemgetter("samples")):
        for name, (variant, kind) in OF_FAIR.items():
            if run["variant"] == variant and kind in run["rows"]:
                found[run["samples"]][name].append(run["rows"][kind]["test_conversations"])
    swept = continuous_cache.results("fair")
    for row in swept["rows"]:
        if row["variant"] in (NONE, SLOTS, LAST, ALL):
            found[row["samples"]][row["variant"]] = losses(swept, row["samples"], row["variant"])[0]
    return {count: {name: np.array(own) for name, own in rows.items()} for count, rows in found.items()}


def fair_changes(pairs: Sequence[Pair]) -> list[dict[Pair, dict[int, Change]]]:
    """Compare rows of `fair`, by pair and sample count: of draws of conversations, and of groups of speakers.

    Args:
        pairs: names in `OF_FAIR`, or of rows without caches.
    """
    found, tokens = fair_losses(), test_tokens(50)
    return [
        {
            (own, other): {
                count: difference(rows[own], rows[other], tokens, groups)
                for count, rows in found.items()
                if own in rows and other in rows
            }
            for own, other in pairs
        }
        for groups in (None, speaker_groups(50))
    ]
