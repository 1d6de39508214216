"""Standard errors of test perplexity, and differences between variants with confidence intervals."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..errors import UserError
from ..files import digest
from ..plugins.plugins import short_name
from ..progress import format_count, log
from ..runs.config import ExperimentConfig, differing_settings
from ..runs.summary import Run, load_run

DRAWS = 10_000  # bootstrap draws
LEAST_CONVERSATIONS = 5  # minimum test conversations for an interval
LEAST_SEEDS = 3  # minimum seeds for a verdict
MOST_SEEDS = 100  # maximum seeds that an estimate suggests
ESTIMATE = (
    "The number of seeds is a simple estimate: it assumes that the difference and its spread over seeds and "
    "test conversations stay as they are now."
)
Floats = NDArray[np.float64]
Z = 1.96  # half-width of the 95% interval of a normal distribution, in standard deviations
AnyRun = Run | Path | str  # a run or its folder
Runs = AnyRun | Sequence[AnyRun] | Mapping[str, AnyRun | Sequence[AnyRun]]  # a mapping labels variants
Seeds = dict[int, Run]  # the runs of one variant, by seed


class Variant(NamedTuple):
    """The runs of a variant by seed, and those of its base, which may be none or the variant itself."""

    name: str
    seeds: Seeds
    base: Seeds


class Interval(NamedTuple):
    """A difference in percent, and the interval that contains 95% of the bootstrap draws."""

    percent: float
    low: float
    high: float


def interval(losses: Floats, base: Floats, tokens: Floats, draws: int = DRAWS) -> Interval:
    """Compute how many percent higher a perplexity is than the base's perplexity, with a 95% interval.

    The interval is the percentile interval of a paired bootstrap. Each draw resamples the test conversations
    with replacement, in the same way for both sides, and draws a mean over seeds from Student's t
    distribution around the observed mean. A single seed has no spread, so with one seed the interval covers
    conversations only.

    Args:
        losses: mean loss per token of each conversation in nats, `[seeds, conversations]`.
        base: losses of the base in the same form. If `losses` and `base` have the same number of seeds, they
            are compared in pairs, row by row. Otherwise, their seeds are drawn separately.
        tokens: number of predicted tokens in each conversation, `[conversations]`. They weight the losses.

    We simulated two equally good variants with the spreads observed in the study. With three seeds, the
    interval contained zero in 94% of cases with 50 conversations, in 92% with 10, and in 89% with 5. If both
    variants are equally good with a single seed, the interval of this seed contained zero in 93% of cases
    with 50 conversations, in 89% with 10, and in 82% with 5.

    Reference:
        P. Koehn (2004), Statistical significance tests for machine translation evaluation (the bootstrap).
        Student (1908), The probable error of a mean (the spread over few seeds).
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
    """Draw random weights for the mean over seeds, `[draws, count]`. The weights of each draw sum to 1.

    The weighted means follow Student's t distribution around the mean of the seeds, with count - 1 degrees of
    freedom. Drawing seeds with replacement would give too little spread: with three seeds, the 95% interval
    would contain the true mean in only 75% of cases.
    """
    normal = generator.standard_normal((draws, count))
    scale = np.sqrt(count * generator.chisquare(max(1, count - 1), (draws, 1)))
    return 1 / count + (normal - normal.mean(axis=1, keepdims=True)) / scale


def standard_error(conversations: Sequence[tuple[int, float]]) -> float:
    """Compute the relative standard error of a perplexity from each conversation's `(tokens, mean loss)`."""
    tested = pd.DataFrame(conversations, columns=["tokens", "loss"])
    mean = (tested.tokens * tested.loss).sum() / tested.tokens.sum()
    return (tested.tokens * (tested.loss - mean)).sem() / tested.tokens.mean()


def seeds_needed(losses: Floats, base: Floats, tokens: Floats) -> int | None:
    """Estimate how many seeds would make a difference clear if only the number of seeds changed.

    The arguments are the same as for `interval`, but both sides must have the same seeds, at least two. The
    half-width of the interval is approximated by `sqrt(t² s² / n + z² c²)`, where s is the standard deviation
    over seeds, n the number of seeds, t a quantile of Student's distribution, z a quantile of the normal
    distribution, and c the standard error over conversations.

    Returns:
        the smallest sufficient number of seeds from `LEAST_SEEDS` to `MOST_SEEDS`. It is None if even
        `MOST_SEEDS` seeds would leave the difference unclear.
    """
    nats = np.average(losses - base, axis=1, weights=tokens)  # one mean per seed
    over_conversations = standard_error([*zip(tokens, (losses - base).mean(axis=0), strict=True)])
    for count in range(LEAST_SEEDS, MOST_SEEDS + 1):
        # Approximate Student's quantile for count - 1 degrees of freedom; the error is below 2%.
        t = Z * (1 + 1.2 / (count - 2))
        if abs(nats.mean()) > np.hypot(t * nats.std(ddof=1) / count**0.5, Z * over_conversations):
            return count
    return None


def difference(runs: Runs, base: AnyRun | Sequence[AnyRun]) -> pd.DataFrame:
    """Compute how many percent higher the test perplexity of each variant is than the base's.

    Runs that differ only in `runtime.seed` are one variant. The seeds that a variant shares with the base are
    compared in pairs, by the method of `report.difference.interval`. A variant that shares no seed with the
    base is left out, and a message says so.

    Args:
        runs: one or more finished runs, or their folders, tested on the same text. They may have any settings
            and seeds, and may include runs of the base. A mapping gives each variant its label.
        base: one or more finished runs of a single variant, or their folders, with any seeds. If these runs
            have several sizes (`data.samples`), each variant is compared with the base of the same size.

    Returns:
        one row per variant. Without labels, it is named after the settings in which it differs from the base.
        `percent` is negative if the variant is better, and `low` and `high` are the ends of the 95% interval.
        `verdict` is "more seeds needed" with fewer than three seeds. Otherwise, it is "clearly better" or
        "clearly worse" if the interval excludes zero (a statistically clear difference), and "no clear
        difference" if not. `seeds` is the number of shared seeds, and `conversations` the number of test
        conversations. `interval_over` says what the interval covers: "conversations and seeds" or, with one
        seed, "conversations only". `more_seeds` estimates how many more seeds would make an unclear
        difference clear (see `report.difference.seeds_needed`). It is missing with one seed or if 100 seeds
        are too few.

    Raises:
        UserError: a folder contains no finished run, `base` has several variants, the test conversations
            differ or are fewer than five, or no variant shares a seed with the base.
    """
    rows, left_out = dict[str, dict[str, Any]](), list[str]()
    for variant in variants(runs, base):
        if variant.seeds is variant.base:
            continue
        if variant.seeds.keys() & variant.base.keys():
            rows[variant.name] = compared(variant.seeds, variant.base)
        else:
            here, there = _listed(variant.seeds), _listed(variant.base) or "none of this size"
            left_out.append(
                f"{variant.name} has seeds {here}, but base has {there}; run both with the same runtime.seed."
            )
    if not rows and not left_out:
        raise UserError("runs has no variant besides base; give runs that differ from base in a setting.")
    if not rows:
        raise UserError(left_out[0])
    for sentence in left_out:
        log(f"Left out: {sentence}")
    return pd.DataFrame.from_dict(rows, orient="index").astype({"more_seeds": "Int64"})


def variants(runs: Runs, base: AnyRun | Sequence[AnyRun] | None) -> list[Variant]:
    """Group runs by variant, as `difference` does: first the base (one variant per size), then the others.

    Without `base`, the first variant of `runs` is the base, with all its sizes.

    Raises:
        UserError: There are no runs, or `base` has several variants.
    """
    groups = runs if isinstance(runs, Mapping) else {"": runs}
    given = [(label, *item) for label, group in groups.items() for item in _by_variant(group).items()]
    if not given:
        raise UserError("runs is empty; give at least one finished run.")
    if base is None:
        (_, (_, settings), _), *_ = given
        bases = {key: seeds for _, key, seeds in given if key[1] == settings}
    else:
        bases = _by_variant(base)
    if len({settings for _, settings in bases}) != 1:
        raise UserError(
            f"base has runs of {len(bases)} variants; give the runs of a single variant, with any seeds."
        )
    base_of_size = {size: seeds for (size, _), seeds in bases.items()}
    first = next(run for seeds in bases.values() for run in seeds.values())
    name = next((label for label, key, _ in given if key in bases and label), first.config.recipe)
    sized = [(name, size, seeds) for size, seeds in base_of_size.items()]
    sized += [(label, key[0], seeds) for label, key, seeds in given if key not in bases]
    return [
        Variant(name, seeds, _base_of(size, base_of_size))
        for name, (_, size, seeds) in zip(_names(sized, base_of_size), sized, strict=True)
    ]


def _by_variant(given: AnyRun | Iterable[AnyRun]) -> dict[tuple[int, str], Seeds]:
    """Group runs by size and by a digest of all other settings but the seed. Groups map seeds to runs."""
    groups = dict[tuple[int, str], Seeds]()
    runs = [given] if isinstance(given, AnyRun) else given
    for run in (run if isinstance(run, Run) else load_run(run) for run in runs):
        settings = run.config.flat()
        seed, size = settings.pop("runtime.seed"), settings.pop("data.samples")
        groups.setdefault((size, digest(settings)), {})[seed] = run
    return groups


def _base_of(size: int, base_of_size: Mapping[int, Seeds]) -> Seeds:
    """Return the base runs of a size, or all if they have one size only. There may be none of this size."""
    (first, *more) = base_of_size.values()
    return base_of_size.get(size, {} if more else first)


def _names(variants: Sequence[tuple[str, int, Seeds]], base_of_size: Mapping[int, Seeds]) -> list[str]:
    """Name variants by their labels, or by the settings in which they differ from their base.

    If the base has several sizes, each name includes the variant's size. If several variants get the same
    name, the names of their folders are added.
    """
    names = []
    for label, size, seeds in variants:
        base = _base_of(size, base_of_size) or next(iter(base_of_size.values()))
        name = label or _differing(*(next(iter(side.values())).config for side in (base, seeds)))
        sized = [name, format_count(size)] if len(base_of_size) > 1 else [name]
        names.append(", ".join(filter(None, sized)) or format_count(size))
    paths = [next(iter(seeds.values())).path for *_, seeds in variants]
    folders = [path.name for path in paths]
    if len({*folders}) < len(folders):
        folders = [str(path) for path in paths]
    return [
        name if names.count(name) == 1 else f"{name} ({folder})"
        for name, folder in zip(names, folders, strict=True)
    ]


def _differing(base: ExperimentConfig, config: ExperimentConfig) -> str:
    """Describe the settings in which an experiment differs from its base, such as "block=GatedBlock"."""
    words = []
    for key, value in differing_settings([base, config])[1].items():
        group, _, name = key.rpartition(".")
        if name == "plugin":
            words.append(f"{group}={short_name(value) if value else value}")
        elif key not in ("runtime.seed", "data.samples"):
            words.append(f"{key}={value}")
    return ", ".join(words)


def compared(runs: Seeds, base: Seeds) -> dict[str, Any]:
    """Compare two variants on the seeds that they share. Return a row of `difference`."""
    seeds = sorted(runs.keys() & base.keys())
    tests = [_test(side[seed], base[seeds[0]]) for side in (base, runs) for seed in seeds]  # (tokens, loss)
    base_losses, losses = np.array(tests)[..., 1].reshape(2, len(seeds), -1)
    tokens = np.array(tests[0])[:, 0]
    percent, low, high = interval(losses, base_losses, tokens)
    verdict = "clearly worse" if low > 0 else "clearly better" if high < 0 else "no clear difference"
    verdict = verdict if len(seeds) >= LEAST_SEEDS else "more seeds needed"
    needed = None
    if len(seeds) > 1 and "clearly" not in verdict:
        needed = seeds_needed(losses, base_losses, tokens)
    return {
        "percent": percent,
        "low": low,
        "high": high,
        "verdict": verdict,
        "seeds": len(seeds),
        "conversations": len(tests[0]),
        "interval_over": "conversations and seeds" if len(seeds) > 1 else "conversations only",
        "more_seeds": needed and max(1, needed - len(seeds)),
    }


def format_difference(table: pd.DataFrame) -> str:
    """Format the result of `difference` for a terminal, with notes on how many more seeds are needed."""
    lines = [table.drop(columns="more_seeds").round(1).to_string(), ""]
    for name, row in table.iterrows():
        if row.seeds == 1:
            lines.append(f"{name}: one seed says nothing about other seeds; add {LEAST_SEEDS - 1} or more.")
        elif pd.notna(row.more_seeds):
            lines.append(
                f"{name}: about {format_count(row.more_seeds, ' more seeds')} would give a clear difference."
            )
        elif "clearly" not in row.verdict:
            lines.append(
                f"{name}: even {MOST_SEEDS} seeds would leave the difference unclear; use more test "
                "conversations (data.test_samples), or call it a tie."
            )
    if (~table.verdict.str.startswith("clearly") & (table.seeds > 1)).any():
        lines.append(ESTIMATE)
    return "\n".join(lines).rstrip()


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _test(run: Run, other: Run) -> list[tuple[int, float]]:
    """Return `(tokens, mean loss)` per test conversation. Raises if `other` was tested on different texts."""
    test, expected = (side.summary.get("test") or {} for side in (run, other))
    conversations: list[tuple[int, float]] = test.get("conversations", [])
    if len(conversations) < LEAST_CONVERSATIONS:
        raise UserError(
            f"{run.path} has {len(conversations)} test conversations; allowed: {LEAST_CONVERSATIONS} or "
            "more. Run all variants with a larger data.test_samples."
        )
    tokens = [[count for count, _ in split.get("conversations", [])] for split in (test, expected)]
    if test["fingerprint"] != expected.get("fingerprint") or tokens[0] != tokens[1]:
        raise UserError(
            f"{run.path} and {other.path} were tested on different texts, so they cannot be compared; run "
            "both with the same data and data.test_samples."
        )
    return conversations
