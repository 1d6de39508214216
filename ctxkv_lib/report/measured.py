"""Measurements for tables: how sure a test perplexity is, what contexts hold and what they are used for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..method.config import ModelConfig
from .tables import table_cells, terminal_table
from .templates import words

Summary = Mapping[str, Any]
NGRAMS = "ngrams"  # of the summary
KINDS = ("kneser_ney", "kneser_ney_cache")


def over_conversations(tokens: Sequence[int], losses: Sequence[float]) -> tuple[float, float]:
    """Compute the mean over all tokens, and its standard error where whole conversations are drawn.

    Args:
        tokens: of each of two conversations or more.
        losses: their means, in nats, or differences of two models' means.
    """
    total, count = sum(tokens), len(tokens)
    mean = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / total
    squares = sum((n * (loss - mean)) ** 2 for n, loss in zip(tokens, losses, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total


def ppl_errors(columns: Sequence[Any]) -> Iterator[tuple[str, float, int]]:
    """Yield label, relative standard error of the test PPL, and number of conversations of each run."""
    for column, tokens, losses in _tested(columns):
        yield column.label, over_conversations(tokens, losses)[1], len(tokens)


def ppl_changes(columns: Sequence[Any]) -> Iterator[tuple[str, str, float, float]]:
    """Yield label, first run's label, and the relative change of test PPL with its standard error.

    Losses are compared conversation by conversation, of runs that were tested on the same ones.
    """
    tested = list(_tested(columns))
    for column, tokens, losses in tested[1:]:
        base, base_tokens, before = tested[0]
        if tokens == base_tokens:
            more = [loss - other for loss, other in zip(losses, before, strict=True)]
            mean, error = over_conversations(tokens, more)
            yield column.label, base.label, math.expm1(mean), error * math.exp(mean)


def _tested(columns: Sequence[Any]) -> Iterator[tuple[Any, tuple[int, ...], tuple[float, ...]]]:
    """Yield the runs that were tested on several conversations, with tokens and loss of each."""
    for column in columns:
        found = column.summary.get("test", {}).get("conversations", [])
        if len(found) > 1:
            yield column, *zip(*found, strict=True)


def beside_ngrams(summary: Summary) -> Iterator[tuple[str, float, float]]:
    """Yield each split that has both, and by how much (%) the PPL is below n-grams without and with cache."""
    for split, own in (("val", summary["phase2"]["val_ppl"]), ("test", summary.get("test", {}).get("ppl"))):
        ngrams = [summary.get(NGRAMS, {}).get(kind, {}).get(f"{split}_ppl") for kind in KINDS]
        if own and all(ngrams):
            yield split, *(100 * (1 - own / theirs) for theirs in ngrams)


def probe_blocks(probes: Mapping[str, Summary], with_untrained: bool) -> list[dict[str, Any]]:
    """Make the columns of ContextBlocks: of several runs by label, or of one run beside untrained ones."""
    blocks = [{"label": label, "std": None, **probe} for label, probe in probes.items()]
    if with_untrained and blocks:
        untrained = blocks[0]["fresh"].items()
        blocks = [{**blocks[0], "label": None}, *({"label": None, "std": std, **b} for std, b in untrained)]
    return [{**block, "at": {row["distance"]: row for row in block["recall"]}} for block in blocks]


def probe_table(probe: Summary, model: ModelConfig, language: str = "en") -> list[list[str]]:
    """Compare one run's contexts with those of untrained blocks: rows of cells, header first."""
    blocks = probe_blocks({"": probe}, with_untrained=True)
    return table_cells(words(language).probe(blocks, model.interval))


def format_probe(probe: Summary, model: ModelConfig, language: str = "en") -> str:
    """Format `probe_table` for a terminal."""
    return terminal_table(probe_table(probe, model, language))


def format_ablations(ablations: Summary, language: str = "en") -> str:
    """Format, for a terminal, what other contexts cost, in all and for kinds of positions."""
    macros = words(language)
    tables = macros.ablation(ablations), macros.position_kinds(ablations)
    return "\n\n".join(terminal_table(table_cells(table)) for table in tables)
