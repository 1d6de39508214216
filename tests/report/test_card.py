"""A card has one row per variant, with what the variant reaches and what it costs."""

import math

import numpy as np
import pytest
from conftest import PreviousToken, write_conversations

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.report.card import card
from ctxkv_lib.report.difference import difference
from ctxkv_lib.runs.opened import open_run


@pytest.fixture(scope="module")
def of_variants(tmp_path_factory):
    """Return runs by variant: two seeds of contexts and of a layer that reads tokens."""
    from tiny import local_experiment

    from ctxkv_lib.runs.presets import build_config

    folder = tmp_path_factory.mktemp("card")
    settings = local_experiment(folder) | {"data.test_samples": 5, "phase2.max_epochs": 1}
    write_conversations(folder / "conversations.jsonl", 20)
    config = build_config("ci", samples=8, settings=settings)

    def seeds(numbers, **plugins):
        configs = [config.replace({"runtime.seed": number}) for number in numbers]
        return [run(each.with_plugins(**plugins), folder / f"{len([*folder.iterdir()])}") for each in configs]

    return {"contexts": seeds((1, 2)), "previous token": seeds((1, 2), layer=PreviousToken)}


def test_a_card_has_results_and_costs(of_variants):
    contexts, tokens = of_variants.values()
    table = card(of_variants)
    assert [*table.index] == [*of_variants]
    assert table["seeds"].tolist() == [2, 2]
    for name, runs in of_variants.items():
        perplexities = [each.summary["test"]["ppl"] for each in runs]
        assert table.test_ppl[name] == pytest.approx(np.mean(perplexities))
        assert table.test_ppl_sd[name] == pytest.approx(np.std(perplexities, ddof=1))
    expected = difference(tokens, contexts)
    assert table.verdict.tolist() == ["the base", "more seeds needed"]
    columns = ["percent", "low", "high"]
    np.testing.assert_allclose(table[columns].iloc[1:], expected[columns])
    assert table[columns].iloc[0].isna().all()
    # A block of 16 x (16 + 24) + 16 weights and its norm, and the layers.
    block = 16 * 40 + 16 + 2 * 16
    layer = contexts[0].summary["parameters"]["trainable_phase2"]
    assert table.weights.tolist() == [block + layer, 24 * 24 + 24]
    # Ten contexts of 16 numbers of 4 bytes, each with a token id of 8 bytes; two token ids.
    assert table.bytes_kept.tolist() == [10 * (64 + 8), 2 * 8]
    seconds = [
        np.mean([each.summary["phase2"]["seconds_per_epoch"] for each in runs])
        for runs in of_variants.values()
    ]
    assert table.epoch_time.tolist() == pytest.approx([1, seconds[1] / seconds[0]])
    span = open_run(contexts[0]).memory_span().attrs["span"]
    np.testing.assert_equal(table.memory_span.tolist(), [span, math.nan])


def test_any_variant_can_be_the_base_and_seeds_need_not_be_shared(of_variants):
    contexts, tokens = of_variants.values()
    table = card([*contexts, *tokens], tokens)
    assert [*table.index] == ["exact", "layer=None"]
    assert table.verdict["exact"] == "the base"
    other = card([contexts[0], tokens[1]])
    assert other.verdict.tolist() == ["the base", "shares no seed with the base"]
    assert other[["percent", "test_ppl_sd"]].isna().all(axis=None)
    with pytest.raises(UserError, match="base has runs of 2 variants"):
        card(contexts, [*contexts, *tokens])
    with pytest.raises(UserError, match="runs is empty; give at least one finished run"):
        card([])


def test_the_command_line_prints_a_card(of_variants, printed_by):
    path = of_variants["contexts"][0].path
    (row,) = printed_by("card", path, "--json")
    assert row["variant"] == "exact"
    assert row["percent"] is None
    words = printed_by("card", path)
    assert "test_ppl" in words
    assert f"{row['weights']:,}" in words
