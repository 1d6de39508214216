"""How sure a difference is: a paired bootstrap over test conversations, with draws of the mean over seeds.

    python notebooks/study/intervals.py notebooks/study/results/fair contexts

prints every row beside the one that is named, with two intervals: of draws of conversations, and of draws
of groups of conversations that share speakers. The last column is the first two over those test conversations
alone whose speakers do not speak in the training conversations, with their number.
"""

import sys
from collections.abc import Sequence
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ctxkv_lib.research.sweep_file import read_sweep
from numpy.typing import NDArray

from ctxkv_lib import build_config
from ctxkv_lib.data.chitchat import chitchat_rows
from ctxkv_lib.data.hub import package_file
from ctxkv_lib.data.settings import DataConfig
from ctxkv_lib.files import read_json
from ctxkv_lib.runs.testing import by_conversation, test_stream

DRAWS = 10_000
LEVEL = 95  # per cent of the draws that an interval holds
EDGES = ((100 - LEVEL) / 2, (100 + LEVEL) / 2)  # its percentiles
HEADER = [  # of `beside`
    "samples",
    "row",
    "change from the base",
    "interval",
    "by groups of speakers",
    "other speakers alone (number)",
]

Losses = NDArray[np.float64]  # [seeds, conversations], mean losses in nats


@cache
def test_tokens(count: int) -> Losses:
    """Count the predicted tokens of each test conversation of preset `offline`: `[count]`."""
    stream = test_stream(build_config("offline", settings={"data.test_samples": count}))
    assert stream is not None
    parts = by_conversation(torch.empty(len(stream.ids) - 1), stream.starts)
    return np.array([len(part) for part in parts], dtype=np.float64)


def losses(results: dict[str, Any], samples: int, variant: str) -> tuple[Losses, Losses]:
    """Return a row's losses, and the conversations' predicted tokens `[conversations]`.

    Args:
        results: of a sweep.
        variant: one of its variants, or a key of its `ngrams`.
    """
    cells = [cell for cell in results["cells"] if "test_conversations" in cell]
    rows = [cell for cell in cells if (cell["samples"], cell["variant"]) == (samples, variant)]
    rows.sort(key=itemgetter("seed"))
    found = [row["test_conversations"] for row in rows or [results["ngrams"][str(samples)][variant]]]
    return np.array(found), test_tokens(len(found[0]))


@cache
def speakers(split: str, config: DataConfig) -> list[set[str]]:
    """Return who speaks in each conversation of a split, `train` or `test`."""
    dataset = read_json(package_file("chitchat_dataset", "dataset.json"))
    names = [name.partition(":")[2] for name, _ in chitchat_rows(config, split)]
    return [{turn[0]["sender"] for turn in dataset[name]["messages"]} for name in names]


def speaker_groups(count: int) -> list[int]:
    """Number the group of each test conversation: those that share a speaker, also through others."""
    conversations = speakers("test", DataConfig(test_samples=count))
    groups: list[set[str]] = []
    for own in conversations:
        shared = [group for group in groups if group & own]
        groups = [group for group in groups if not group & own] + [own.union(*shared)]
    return [next(place for place, group in enumerate(groups) if own <= group) for own in conversations]


def speakers_apart(count: int, samples: int) -> NDArray[np.bool_]:
    """Find the test conversations, `[count]`, whose speakers do not speak in the training conversations."""
    trained = set().union(*speakers("train", DataConfig(samples=samples)))
    return np.array([not own & trained for own in speakers("test", DataConfig(test_samples=count))])


def resampled(draw: np.random.Generator, count: int, draws: int = DRAWS) -> NDArray[np.int64]:
    """Draw `count` of so many things with replacement: how often each is drawn, `[draws, count]`."""
    return draw.multinomial(count, np.full(count, 1 / count), draws)


def seed_shares(draw: np.random.Generator, count: int, draws: int = DRAWS) -> Losses:
    """Draw what share each seed has in their mean, `[draws, count]`; each draw sums to 1.

    Such means have Student's t distribution around the mean of the seeds, with count - 1 degrees of freedom.
    (Of draws with replacement, an interval of three normal numbers holds their true mean in 75% instead of
    95%.) A single seed has no spread.
    """
    normal = draw.standard_normal((draws, count))
    scale = np.sqrt(count * draw.chisquare(max(1, count - 1), (draws, 1)))
    return 1 / count + (normal - normal.mean(axis=1, keepdims=True)) / scale


def difference(
    own: Losses, other: Losses, tokens: Losses, groups: Sequence[int] | None = None
) -> tuple[float, float, float]:
    """Compute by how many per cent the perplexity of `own` is above that of `other`, with its interval.

    Args:
        own, other: `[seeds, conversations]`; the same seeds are compared in pairs. Of other numbers of seeds,
            each has its own spread; a single seed has none, so that the interval is too short.
        tokens: `[conversations]`, the weights of their losses. A draw takes the same conversations of both.
        groups: `[conversations]`, those that are drawn together; None: each by itself.
    """
    if len(own) == len(other):
        own, other = own - other, np.zeros((1, len(tokens)))
    groups = range(len(tokens)) if groups is None else groups
    draw = np.random.default_rng(0)
    members = np.eye(max(groups) + 1)[list(groups)]  # (conversations, groups)
    weights = resampled(draw, members.shape[1]) @ members.T * tokens  # (draws, conversations)
    weights /= weights.sum(axis=1, keepdims=True)
    above = [((seed_shares(draw, len(each)) @ each) * weights).sum(axis=1) for each in (own, other)]
    found = np.average(own.mean(axis=0) - other.mean(axis=0), weights=tokens)
    low, high = np.percentile(above[0] - above[1], EDGES)
    return tuple(float(100 * np.expm1(value)) for value in (found, low, high))  # type: ignore[return-value]


def beside(results: dict[str, Any], base: str) -> list[list[str]]:
    """List sample count, row, and its difference from `base` with its intervals, for all rows but `base`."""
    rows = []
    scored = [cell for cell in results["cells"] if "test_conversations" in cell]
    for samples in sorted({cell["samples"] for cell in scored if cell["variant"] == base}):
        other, tokens = losses(results, samples, base)
        groups, apart = speaker_groups(len(tokens)), speakers_apart(len(tokens), samples)
        names = dict.fromkeys(cell["variant"] for cell in scored if cell["samples"] == samples)
        ngrams = results["ngrams"][str(samples)].items()
        for name in [*names, *(kind for kind, row in ngrams if "test_conversations" in row)]:
            if name != base:
                own = losses(results, samples, name)[0]
                found = [difference(own, other, tokens, drawn) for drawn in (None, groups)]
                intervals = [f"{low:+.1f}% to {high:+.1f}%" for _, low, high in found]
                alone = "none"
                if apart.any():
                    change, low, high = difference(own[:, apart], other[:, apart], tokens[apart])
                    alone = f"{change:+.1f}%, {low:+.1f}% to {high:+.1f}% ({apart.sum()})"
                rows.append([f"{samples:,}", name, f"{found[0][0]:+.1f}%", *intervals, alone])
    return rows


if __name__ == "__main__":
    folder, base = sys.argv[1:]
    lines = beside(read_sweep(Path(folder) / "sweep.json"), base)
    if not lines:
        sys.exit(f"{folder} has no losses by conversation of {base!r} and another row.")
    for line in [HEADER, *lines]:
        print("  ".join(cell.ljust(28) for cell in line))
