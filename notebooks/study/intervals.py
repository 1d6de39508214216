"""How sure a difference is: intervals of rows of results, by the method of `ctxkv.difference`.

python notebooks/study/intervals.py FILE BASE prints every row of a file of results beside the row BASE.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctxkv_lib.report.difference import Interval, interval

RESULTS = Path(__file__).resolve().parent / "results"
ADVICE = "give a file that train.py wrote, or one of notebooks/study/results."

Row = dict[str, Any]


class Losses(NamedTuple):
    """Mean losses in nats of the same test conversations.

    Attributes:
        values: float64 `[seeds, conversations]`.
        tokens: float64 `[conversations]`, the predicted tokens of each: the weights of their losses.
    """

    values: NDArray[np.float64]
    tokens: NDArray[np.float64]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file: as `train.py` writes them, or those that are kept in `results`.

    Returns:
        of each row at least `variant` and `samples`; `seed`, None for n-grams; `kind`, if it is in a file
        of caches; and where losses by conversation are known, `test_conversations` and `test_tokens`.

    Raises:
        ValueError: rows of another place do not have the token counts of their test conversations.
    """
    stored = read_json(path)
    if isinstance(stored, list):
        if not all("test_tokens" in row for row in stored):
            raise ValueError(f"{path} has rows without the token counts of their test; {ADVICE}")
        return stored
    if not path.resolve().is_relative_to(RESULTS):
        raise ValueError(f"{path} has no token counts of its test conversations; {ADVICE}")
    rows = [{**shared, **own} for shared in stored.get("rows", ()) for own in shared["cells"]]
    for samples, kinds in stored.get("ngrams", {}).items():
        rows += [{"variant": name, "samples": int(samples), **found} for name, found in kinds.items()]
    for run in stored.get("runs", ()):
        rows += [{**run, "kind": kind, **found} for kind, found in run["rows"].items()]
    counts = read_json(RESULTS / "test_conversations.json")["tokens"]
    for row in rows:
        if "test_conversations" in row:
            row["test_tokens"] = counts[str(len(row["test_conversations"]))]
    return [{"seed": None, **row} for row in rows]


def losses(rows: Sequence[Row], variant: str, samples: int) -> Losses | None:
    """Collect the losses of a variant's seeds; None if there are none by conversation.

    Raises:
        ValueError: the seeds were measured on different test conversations.
    """
    own = [row for row in rows if (row["variant"], row["samples"]) == (variant, samples)]
    found = sorted((row for row in own if "test_conversations" in row), key=lambda row: row["seed"] or 0)
    if not found:
        return None
    if any(row["test_tokens"] != found[0]["test_tokens"] for row in found):
        raise ValueError(f"{variant} has rows of different test conversations; keep those of one test split.")
    values = np.array([row["test_conversations"] for row in found])
    return Losses(values, np.array(found[0]["test_tokens"], dtype=float))


def difference(own: Losses, other: Losses, groups: Sequence[int] | None = None) -> Interval:
    """Compare the perplexities of two rows, as `ctxkv_lib.report.difference.interval` does.

    Args:
        groups: `[conversations]`, those that are drawn together; None: each by itself.

    Raises:
        ValueError: they were measured on different test conversations.
    """
    if not np.array_equal(own.tokens, other.tokens):
        raise ValueError("The rows are of different test conversations; compare rows of one test split.")
    values, others, tokens = own.values, other.values, own.tokens
    if groups is not None:  # a group is a conversation of all its tokens
        members = np.eye(max(groups) + 1)[list(groups)]  # (conversations, groups)
        group_tokens = tokens @ members
        values, others = ((each * tokens) @ members / group_tokens for each in (values, others))
        tokens = group_tokens
    return interval(values, others, tokens)


def known_groups(tokens: NDArray[np.float64]) -> list[int]:
    """Return the groups of speakers of the test conversations that the kept results are of."""
    return read_json(RESULTS / "test_conversations.json")["speakers"][str(len(tokens))]


if __name__ == "__main__":
    try:
        rows, base = read_rows(Path(sys.argv[1])), sys.argv[2]
        for samples, name in sorted({(row["samples"], row["variant"]) for row in rows}):
            own, other = losses(rows, name, samples), losses(rows, base, samples)
            if name != base and own and other:
                found, low, high = difference(own, other)
                print(f"{samples:,} conversations, {name}: {found:+.1f}% ({low:+.1f}% to {high:+.1f}%)")
    except ValueError as problem:
        sys.exit(str(problem))
