"""Differences between variants: cases computed by hand, coverage of intervals, and refused comparisons."""

import re
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TOP, GatedBlock
from sample_runs import sample_run
from tables import TEST

from ctxkv_lib.errors import UserError
from ctxkv_lib.report.difference import difference, interval, standard_error


def arrays(*values):
    return [np.asarray(value, dtype=float) for value in values]


def test_a_difference_compares_perplexities_and_weights_conversations_by_tokens():
    generator = np.random.default_rng(1)
    base, tokens = generator.normal(5, 0.5, (1, 30)), generator.integers(10, 900, 30)
    assert interval(base, base, tokens) == (0, 0, 0)
    assert interval(base + np.log(1.1), base, tokens) == pytest.approx((10, 10, 10))
    percent, low, high = interval(*arrays([[0.1, 0.3]], [[0, 0]], [1, 3]))
    assert percent == pytest.approx(28.40254)  # exp((0.1 + 3 * 0.3) / 4)
    assert (low, high) == pytest.approx((10.51709, 34.98588))  # if one conversation is drawn twice


def test_the_same_seeds_are_compared_in_pairs():
    """An effect of the seed on both variants changes neither the difference nor its interval."""
    losses, base = arrays([[2.0, 2.0], [5.0, 5.0], [11.0, 11.0]], [[2.0, 2.0], [5.0, 5.0], [11.0, 11.0]])
    assert interval(losses + np.log(1.2), base, np.array([1, 3])) == pytest.approx((20, 20, 20))
    _, low, high = interval(losses, base[:1], np.array([1, 3]))  # different numbers of seeds: no pairs
    assert low < -90
    assert high > 1e4


def test_seeds_have_the_interval_of_students_t():
    """Only the seeds differ. Mean and deviation are 0.03, and t is 4.303 for 2 degrees of freedom."""
    losses, base, tokens = arrays([[0.0] * 6, [0.03] * 6, [0.06] * 6], np.zeros((3, 6)), [1] * 6)
    nats = np.log1p(np.array(interval(losses, base, tokens, draws=200_000)) / 100)
    assert nats == pytest.approx([0.03, 0.03 - 4.303 * 0.03 / 3**0.5, 0.03 + 4.303 * 0.03 / 3**0.5], rel=0.03)


def test_conversations_have_the_interval_of_a_mean():
    """With 400 conversations, the interval extends nearly 1.96 standard errors to either side."""
    losses = np.random.default_rng(0).normal(0.1, 0.3, (1, 400))
    nats = np.log1p(np.array(interval(losses, np.zeros((1, 400)), np.ones(400))) / 100)
    error = 1.96 * losses.std() / 400**0.5
    assert nats - losses.mean() == pytest.approx([0, -error, error], rel=0.05, abs=1e-9)


LENGTHS = TEST["tokens"]["50"]
# Standard deviations of a difference in nats, as medians over the study's pairs in `fair` and `phase1`. They
# are between seeds, conversations, tokens (the same for all seeds), and tokens (different for each seed).
SEED, CONVERSATION, TOKEN, TOKEN_BY_SEED = 0.0025, 0.056, 0.42, 0.48


@pytest.mark.slow
def test_intervals_hold_zero_as_often_as_the_docstring_says():
    """The pairs of variants are simulated, without a true difference."""
    conversations, seeds, pairs = 10, 3, 500
    generator, contained = np.random.default_rng(0), 0
    for _ in range(pairs):
        tokens = generator.permutation(LENGTHS)[:conversations]
        level = generator.normal(5, 0.5, conversations)
        spread = np.sqrt(CONVERSATION**2 + TOKEN**2 / tokens)
        sides = []
        for _ in range(2):
            by_seed = generator.normal(0, SEED, (seeds, 1))
            noise = generator.normal(0, TOKEN_BY_SEED / np.sqrt(tokens), (seeds, conversations))
            sides.append(level + (generator.normal(0, spread) + by_seed + noise) / 2**0.5)
        _, low, high = interval(*sides, tokens, draws=2000)
        contained += low <= 0 <= high
    assert 0.89 <= contained / pairs <= 0.95


TOKENS = [100, 300, 50, 200, 150, 200]


def a_run(losses, seed=42, fingerprint="a text", tokens=TOKENS, block=None, **settings):
    """Return a run with the given mean losses of its test conversations."""
    changed = {"runtime.seed": seed, **{key.replace("__", "."): value for key, value in settings.items()}}
    plugins = {"block": block} if block else {}
    run = sample_run(10, "offline", settings=changed, path=Path(f"runs/{seed}"), plugins=plugins)
    test = {
        "conversations": [[*pair] for pair in zip(tokens, losses, strict=True)],
        "fingerprint": fingerprint,
    }
    return replace(run, summary={**run.summary, "test": test})


BASE = [a_run(np.full(6, 5 + seed / 10), seed) for seed in (42, 43, 44)]


def test_a_row_is_a_variant_and_its_seeds_are_paired_with_those_of_the_base(monkeypatch):
    variant = [wide(np.full(6, 5 + seed / 10 + np.log(1.1)), seed) for seed in (44, 43, 42)]
    own = [a_run(np.full(6, 9.2 + np.log(0.5)), 42, block=GatedBlock)]
    table = difference([*own, *BASE, *variant], BASE)
    assert [*table.index] == ["block=GatedBlock", "model.interval=10"]
    np.testing.assert_allclose(table[["percent", "low", "high"]], [[-50] * 3, [10] * 3])
    assert table["verdict"].tolist() == ["more seeds needed", "clearly worse"]
    assert table["seeds"].tolist() == [1, 3]
    assert table["conversations"].tolist() == [6, 6]
    assert table["interval_over"].tolist() == ["conversations only", "conversations and seeds"]
    gone = replace(own[0].config.plugins["block"], name="gone:Block", given=None)  # cannot be loaded
    elsewhere = replace(own[0], config=replace(own[0].config, plugins={"block": gone}))
    assert [*difference(elsewhere, BASE).index] == ["block=Block"]
    labeled = difference({"mine": own, "wide": variant, "base": BASE}, BASE)
    assert [*labeled.index] == ["mine", "wide"]
    monkeypatch.setattr("ctxkv_lib.report.difference.load_run", {run.path: run for run in BASE}.get)
    from_folders = difference(variant, [run.path for run in BASE])
    pd.testing.assert_frame_equal(from_folders, difference(variant, BASE))
    same = difference(variant, BASE[0])  # its other seeds have no pair
    assert same["percent"].item() == pytest.approx(10)
    assert [*same.iloc[0, 3:6]] == ["more seeds needed", 1, 6]


def sized(samples, shift=0.0, seeds=(42, 43, 44), **settings):
    """Return runs with `samples` conversations whose losses are those of the base plus `shift`."""
    made = [a_run(np.full(6, 5 + seed / 10 + shift), seed, **settings) for seed in seeds]
    return [replace(run, config=run.config.replace({"data.samples": samples})) for run in made]


def test_a_variant_or_size_without_common_seeds_is_left_out_and_a_line_says_so(capsys):
    bases = [*sized(10), *sized(50, seeds=(42,))]
    own = [
        run
        for size, seeds in ((10, (42, 43, 44)), (50, (43,)), (20, (42,)))
        for run in (sized(size, np.log(0.9), seeds, block=GatedBlock))
    ]
    table = difference([*own, *bases, *sized(50, np.log(1.1), model__interval=10)], bases)
    assert [*table.index] == ["block=GatedBlock, 10 samples", "model.interval=10, 50 samples"]
    assert table["percent"].tolist() == pytest.approx([-10, 10])
    assert table["verdict"].tolist() == ["clearly better", "more seeds needed"]
    assert capsys.readouterr().err.splitlines() == [
        "Left out: block=GatedBlock, 50 samples has seeds 43, but base has 42; "
        "run both with the same runtime.seed.",
        "Left out: block=GatedBlock, 20 samples has seeds 42, but base has none of this size; "
        "run both with the same runtime.seed.",
    ]
    (row,) = difference(sized(50, np.log(0.9)), sized(10)).index  # a base of one size serves all sizes
    assert row == "50 samples"


def test_two_ideas_with_one_name_are_distinguished_by_their_folders():
    edited = type("GatedBlock", (GatedBlock,), {"__module__": GatedBlock.__module__})
    runs = [
        replace(a_run(np.full(6, 9.0), block=part), path=Path(f"runs/{name}"))
        for name, part in (("one", GatedBlock), ("two", edited))
    ]
    assert [*difference(runs, BASE).index] == ["block=GatedBlock (one)", "block=GatedBlock (two)"]


def test_more_seeds_are_estimated_from_their_spread(printed_by, monkeypatch):
    """The mean is -0.02. Intervals are ±0.032 with four seeds, ±0.021 with six, and ±0.0185 with seven."""
    shifts = {
        "model.interval=10": (0.0, -0.02, -0.04),
        "model.interval=11": (-0.02, -0.02, -0.021),
        "model.interval=12": (-1, 1, 0),
    }
    runs = [
        replace(run, path=Path(f"runs/{name}-{run.config.runtime.seed}"))
        for name, by_seed in shifts.items()
        for seed, shift in zip((42, 43, 44), by_seed, strict=True)
        for run in [a_run(np.full(6, 5 + seed / 10 + shift), seed, model__interval=int(name.split("=")[1]))]
    ]
    one = a_run(np.full(6, 9.0), model__interval=13)
    runs.append(replace(one, path=Path("runs/one")))
    table = difference(runs, BASE)
    assert table["more_seeds"].fillna(0).tolist() == [4, 0, 0, 0]
    folders = {run.path: run for run in [*runs, *BASE]}
    monkeypatch.setattr("ctxkv_lib.report.difference.load_run", folders.get)
    printed = printed_by("difference", *(run.path for run in runs), "--base", *(run.path for run in BASE))
    assert re.search(r"model\.interval=11 +-2\.0 .*clearly better +3 +6 +conversations and seeds", printed)
    assert "model.interval=10: about 4 more seeds would give a clear difference.\n" in printed
    assert (
        "model.interval=12: even 100 seeds would leave the difference unclear; use more test conv" in printed
    )
    assert "model.interval=13: one seed says nothing about other seeds; add 2 or more.\n" in printed
    assert "model.interval=11:" not in printed
    assert "simple estimate: it assumes that the difference and its spread over seeds" in printed


wide = partial(a_run, model__interval=10)
untested = sample_run(10, "offline", settings={"model.interval": 10})


@pytest.mark.parametrize(
    ("runs", "base", "said"),
    [
        (wide([5.0] * 4, tokens=TOKENS[:4]), BASE, "runs/42 has 4 test conversations; all"),
        (untested, BASE, r"0 test .* larger data\.test_samp"),
        (wide([5.0] * 6, fingerprint="b"), BASE, "tested on different texts, so"),
        (wide([5.0] * 6, tokens=[7] * 6), BASE, "tested on different texts"),
        (wide([5.0] * 6, 45), BASE, r"model\.interval=10 has seeds 45, but base has 42, 43, 44;"),
        (BASE, BASE[:1], "runs has no variant besides base"),
        (BASE, [*BASE, wide([5.0] * 6)], "base has runs of 2 variants; give the runs of a single"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, base, said):
    with pytest.raises(UserError, match=said):
        difference(runs, base)


@pytest.mark.slow
def test_the_page_on_own_ideas_looks_inside_and_ends_with_a_card(tmp_path, monkeypatch, own_module, capsys):
    monkeypatch.chdir(tmp_path)
    page = (TOP / "docs" / "own-idea.md").read_text(encoding="utf-8")
    ideas, *_, look, other, verdict, card = re.findall(r"(?s)```python\n(.*?)```", page)
    small = {'"offline"': '"ci"', "50}": '5, "phase2.max_epochs": 1}', "(10, 50)": "(2,)"}
    small |= {"(42, 43, 44)": "(42,)", "workers=2": "workers=1"}
    for old, new in small.items():
        assert old in verdict
        verdict = verdict.replace(old, new)
    shown = f"{ideas}\nimport ctxkv_lib as ctxkv\n{verdict}\n{card}\nrun = mine[0]\n{look}\n{other}"
    opened = import_module(own_module("own_ideas", shown))
    assert opened.losses.mean().exp().item() == pytest.approx(opened.run.summary["test"]["ppl"], rel=1e-4)
    assert all(len(losses) == len(opened.losses) for losses in (opened.of_shuffled, opened.of_zeros))
    printed = capsys.readouterr().out
    assert re.search(r"GatedBlock +[-\d.]+ +[-\d.]+ +[-\d.]+ +more seeds needed +1 +5 +conv", printed)
    assert "memory_span" in printed


def test_the_standard_error_is_that_of_a_mean_weighted_by_tokens():
    assert standard_error([(10, 5.0), (10, 5.2)]) == pytest.approx(0.1)  # two equal halves
    assert standard_error([(5, 5.0), (50, 5.0)]) == 0
    # The mean is 2.5; tokens * (loss - mean) are -1.5 and 1.5: a standard error of 1.5 per 2 tokens.
    assert standard_error([(1, 1.0), (3, 3.0)]) == pytest.approx(0.75)
