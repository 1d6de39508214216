"""Errors of test perplexity over conversations, and differences between variants with their intervals."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..errors import UserError
from ..files import digest
from ..runs.names import run_names
from ..runs.summary import Run, load_run

DRAWS = 10_000
LEAST_CONVERSATIONS = 5  # test conversations; the spread of fewer cannot be estimated
Floats = NDArray[np.float64]
AnyRun = Run | Path | str  # a run, or its folder


class Interval(NamedTuple):
    """A difference in per cent, and the interval that holds 95% of its draws."""

    percent: float
    low: float
    high: float


def interval(losses: Floats, base: Floats, tokens: Floats, draws: int = DRAWS) -> Interval:
    """Compute by how many per cent a perplexity lies above that of a base, with a 95% interval.

    The percentile interval of a paired bootstrap: a draw takes test conversations with replacement, the same
    ones for both, and a mean over seeds from Student's t distribution around theirs. A single seed has no
    spread, so that the interval is that of conversations alone.

    Args:
        losses: mean losses in nats, `[seeds, conversations]`.
        base: likewise. As many seeds are compared in pairs, row by row; of other numbers, each has its own
            spread.
        tokens: predicted tokens of each conversation, `[conversations]`: the weights of their losses.

    Of simulated pairs without a difference, with the spreads of the study's, the interval contained zero in
    94% with 50 conversations and three seeds, 92% with 10, 89% with 5; with one seed, whose difference on all
    text is zero, in 93%, 89% and 82%.

    Reference:
        P. Koehn (2004), Statistical significance tests for machine translation evaluation: the bootstrap.
        Student (1908), The probable error of a mean: the spread over few seeds.
    """
    sides = [losses - base] if len(losses) == len(base) else [losses, -base]
    generator, count = np.random.default_rng(0), len(tokens)
    weights = generator.multinomial(count, np.full(count, 1 / count), draws) * tokens
    weights = weights / weights.sum(axis=1, keepdims=True)  # (draws, conversations)
    drawn = sum(((_seed_shares(generator, len(side), draws) @ side) * weights).sum(axis=1) for side in sides)
    mean = np.average(sum(side.mean(axis=0) for side in sides), weights=tokens)
    nats = (mean, *np.percentile(drawn, (2.5, 97.5)))
    return Interval(*(float(100 * np.expm1(value)) for value in nats))


def _seed_shares(generator: np.random.Generator, count: int, draws: int) -> Floats:
    """Draw what share each seed has in their mean, `[draws, count]`; each draw sums to 1.

    Such means have Student's t distribution around the mean of the seeds, with count - 1 degrees of freedom.
    (Seeds drawn with replacement are too close: three would give an interval of 75% instead of 95%.)
    """
    normal = generator.standard_normal((draws, count))
    scale = np.sqrt(count * generator.chisquare(max(1, count - 1), (draws, 1)))
    return 1 / count + (normal - normal.mean(axis=1, keepdims=True)) / scale


def standard_error(conversations: Sequence[tuple[int, float]]) -> float:
    """Compute the relative standard error of a perplexity over conversations `(tokens, mean loss)`."""
    tested = pd.DataFrame(conversations, columns=["tokens", "loss"])
    mean = (tested.tokens * tested.loss).sum() / tested.tokens.sum()
    return (tested.tokens * (tested.loss - mean)).sem() / tested.tokens.mean()


def difference(runs: AnyRun | Sequence[AnyRun], base: AnyRun | Sequence[AnyRun]) -> pd.DataFrame:
    """Compute by how many per cent the test perplexity of each variant lies above that of a base.

    Runs that differ in `runtime.seed` alone are one variant. The seeds that it shares with the base are
    compared in pairs, by the method of `report.difference.interval`.

    Args:
        runs: one or more finished runs or their folders, of any variants and seeds, tested on the same text.
            Runs of the base may be among them.
        base: one or more finished runs of a single variant, or their folders.

    Returns:
        one row per variant, named by the settings that differ: `percent`, negative if the variant is better;
        `low` and `high`, the ends of the 95% interval; the number of `seeds` in common; the number of test
        `conversations`; and `interval_over`: "conversations and seeds", or "conversations alone" with one
        seed, which says nothing about other seeds. A difference is statistically clear if its interval
        excludes zero.

    Raises:
        UserError: a folder holds no finished run, the test conversations differ or are fewer than five, or no
            seed is in common.
    """
    variants, bases = _by_variant(runs), _by_variant(base)
    if len(bases) != 1:
        raise UserError(f"base has runs of {len(bases)} variants; give the runs of one, with any seeds.")
    ((base_key, base_runs),) = bases.items()
    variants.pop(base_key, None)
    if not variants:
        raise UserError("runs has no other variant than base; give runs that differ in more than their seed.")
    names = run_names([_without_seed(seeds) for seeds in (base_runs, *variants.values())])[1:]
    rows = [_row(name, seeds, base_runs) for name, seeds in zip(names, variants.values(), strict=True)]
    return pd.DataFrame(rows, index=names)


def _without_seed(seeds: Mapping[int, Run]) -> Run:
    """Return one run of a variant with a seed that is the same for all, so that no name has it."""
    run = next(iter(seeds.values()))
    return replace(run, config=replace(run.config, runtime=replace(run.config.runtime, seed=0)))


def _by_variant(given: AnyRun | Iterable[AnyRun]) -> dict[str, dict[int, Run]]:
    """Group runs by a digest of all settings except the seed, and each group by seed."""
    variants: dict[str, dict[int, Run]] = {}
    runs = [given] if isinstance(given, AnyRun) else given
    for run in (run if isinstance(run, Run) else load_run(run) for run in runs):
        settings = run.config.flat()
        seed = settings.pop("runtime.seed")
        variants.setdefault(digest(settings), {})[seed] = run
    return variants


def _row(name: str, runs: Mapping[int, Run], base: Mapping[int, Run]) -> dict[str, Any]:
    seeds = sorted(runs.keys() & base.keys())
    if not seeds:
        raise UserError(
            f"{name} has the seeds {_listed(runs)}, and base {_listed(base)}; run both with the same "
            "runtime.seed."
        )
    tests = [_test(side[seed], base[seeds[0]]) for side in (base, runs) for seed in seeds]  # (tokens, loss)
    base_losses, losses = np.array(tests)[..., 1].reshape(2, len(seeds), -1)
    percent, low, high = interval(losses, base_losses, np.array(tests[0])[:, 0])
    return {
        "percent": percent,
        "low": low,
        "high": high,
        "seeds": len(seeds),
        "conversations": len(tests[0]),
        "interval_over": "conversations and seeds" if len(seeds) > 1 else "conversations alone",
    }


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _test(run: Run, other: Run) -> list[tuple[int, float]]:
    """Return tokens and mean loss of each test conversation, the same ones as those of `other`."""
    test, expected = (each.summary.get("test") or {} for each in (run, other))
    conversations: list[tuple[int, float]] = test.get("conversations", [])
    if len(conversations) < LEAST_CONVERSATIONS:
        raise UserError(
            f"{run.path} has {len(conversations)} test conversations; allowed: {LEAST_CONVERSATIONS} or "
            "more. Run all variants with a larger data.test_samples."
        )
    tokens = [[count for count, _ in split.get("conversations", [])] for split in (test, expected)]
    if test["fingerprint"] != expected.get("fingerprint") or tokens[0] != tokens[1]:
        raise UserError(
            f"{run.path} and {other.path} were tested on different texts; allowed: the same. Run both with "
            "the same data and data.test_samples."
        )
    return conversations
