"""Measure how many of the last tokens can be read from a context, as a table by distance."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..method.block import Block, attribute_or_default, project_inputs
from ..method.contexts import distinct_rows, exact_contexts
from ..method.readout import ReadTokens, decodability, last_remembered
from .build import untrained_model
from .device import torch_state

if TYPE_CHECKING:
    from .opened import OpenRun

FITTED, EVALUATED = 10_000, 5_000  # maximum numbers of tokens
FOLDS = 5
TOLERANCE = 1e-5  # largest error of any number in the contexts


def memory_span(
    block: nn.Module, ids: Tensor, embeddings: Tensor, most: int = 40, context_dim: int = 256
) -> pd.DataFrame:
    """Measure what the contexts of a block remember of earlier tokens.

    A linear readout is fitted on the first two thirds of the text and evaluated on the rest.

    Args:
        block: a ContextBlock, or any block as in docs/own-idea.md.
        ids: the text, integers `[n]`, as row numbers of `embeddings`.
        embeddings: normed token embeddings, float32 `[rows, hidden_size]`.
        most: the largest distance in tokens.
        context_dim: size of the block's contexts.

    Returns:
        a table with one row per distance: `r2`, the share of the variance of the embedding of the token that
        far back which the readout explains, and `recovered`, the share of positions at which it names the
        right token. `table.attrs["span"]` is the last distance with an `r2` above 0.01 before the first one
        without (NaN if there is none), and `table.attrs["span_error"]` its standard error over five parts of
        the text.

    Raises:
        UserError: The text is too short for `most`.
    """
    contexts = _contexts(block, ids.long(), embeddings, context_dim)
    fitted = min(FITTED, 2 * len(ids) // 3)
    read = ReadTokens(contexts, ids.long())
    return _table({"": _measured(read, fitted, read, fitted, embeddings, most)})


@torch.no_grad()
def span_of_run(opened: "OpenRun", split: str, most: int) -> pd.DataFrame:
    """Measure a run's contexts, and those of its block before Phase 1. See `OpenRun.memory_span`."""
    train, stream, model = opened.stream("train").stream, opened.stream(split).stream, opened.model
    texts = [train.ids[:-1].cpu(), stream.ids[:-1].cpu()]
    embeddings, rows = (tensor.cpu() for tensor in distinct_rows(model, torch.cat(texts)))
    tokens = rows.split([len(text) for text in texts])
    begin = max(2 * len(stream) // 3, len(stream) - EVALUATED) if split == "train" else 0
    fitted = min(FITTED, begin or len(train))

    def measured(contexts: Sequence[Tensor]) -> list[dict[str, Any]]:
        first, second = (ReadTokens(*pair) for pair in zip(contexts, tokens, strict=True))
        return _measured(first, fitted, second, begin, embeddings, most)

    trained = [text.contexts[1:].float().cpu() for text in (train, stream) if text.contexts is not None]
    config = opened.run.config
    with torch_state():
        block = untrained_model(config, 1, has_unigram=False).context_block
        torch.manual_seed(config.runtime.seed)  # as before Phase 1
        attribute_or_default(block, "init_weights", Block)(embeddings, tokens[0], config.phase1)
        untrained = [_contexts(block, text, embeddings, config.model.context_dim) for text in tokens]
    return _table({"": measured(trained), "untrained_": measured(untrained)})


@torch.no_grad()
def _contexts(block: nn.Module, tokens: Tensor, embeddings: Tensor, context_dim: int) -> Tensor:
    was_training = block.training
    block.eval()
    zero = embeddings.new_zeros(context_dim)
    contexts = exact_contexts(block, project_inputs(block, embeddings), tokens, zero, TOLERANCE)[1:]
    block.train(was_training)
    return contexts


def _measured(
    train: ReadTokens, fitted: int, other: ReadTokens, begin: int, embeddings: Tensor, most: int
) -> list[dict[str, Any]]:
    """Fit on the first `fitted` tokens of one stream, and evaluate on another one from token `begin` on."""
    first = ReadTokens(train.contexts[:fitted], train.tokens[:fitted])
    chosen = slice(begin, begin + EVALUATED)
    second = ReadTokens(other.contexts[chosen], other.tokens[chosen])
    shortest = min(len(first.tokens), len(second.tokens))
    if not 0 <= most < shortest - FOLDS:
        raise UserError(
            f"most is {most}; allowed here: 0 to {shortest - FOLDS - 1}, since a part of the text has "
            f"{shortest} tokens."
        )
    return decodability(first, second, embeddings, range(most + 1), FOLDS)


def _table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Make the table from the results of each block, by the beginning of its columns' names."""
    table = pd.DataFrame(index=pd.RangeIndex(len(results[""]), name="distance"))
    for name, rows in results.items():
        table[f"{name}r2"] = [row["r2"] for row in rows]
        table[f"{name}recovered"] = [row["top1"] for row in rows]
        span = last_remembered(rows)
        by_fold = [
            last_remembered([{**row, "r2": row["r2_by_fold"][fold]} for row in rows]) for fold in range(FOLDS)
        ]
        spans = pd.Series([-1 if fold_span is None else fold_span for fold_span in by_fold], dtype=float)
        table.attrs[f"{name}span"] = float("nan") if span is None else span
        table.attrs[f"{name}span_error"] = float(spans.std() / FOLDS**0.5)
    return table
