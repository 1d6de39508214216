"""What the contexts of a run remember, beside those of untrained blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..method.config import ModelConfig
from ..method.contexts import distinct_rows
from ..method.evaluation import effective_rank
from ..method.model import CONTEXT_WEIGHT_STD, ContextBlock, ContextKV
from ..method.windows import Window
from ..runs.caches import load_cache
from ..runs.config import ExperimentConfig
from ..runs.run_folder import RunFolder
from .decodability import Stream, centroid, coverage, decodability, mean_decodability, memory_span

ROWS = {"train": 10_000, "val": 5_000}  # tokens of each stream, from its start
UNTRAINED_STDS = (CONTEXT_WEIGHT_STD, 0.01)  # of the weights of the untrained blocks


def distances(interval: int, window: int) -> list[int]:
    """Every distance up to an interval, then each one and a half times the last, within the window."""
    found = list(range(min(interval, window - 1) + 1))
    while (further := 3 * found[-1] // 2) < window and further > found[-1]:
        found.append(further)
    return found


@torch.no_grad()
def probe(config: ExperimentConfig, folder: RunFolder, model: ContextKV) -> dict[str, Any]:
    """Compute `probe` of the summary: of the trained block, and as `fresh` of untrained ones.

    It takes half a minute at most, on the CPU.

    Args:
        folder: of a run that has its caches.
        model: of the run, for its token table and shapes.
    """
    caches = [load_cache(folder.caches, split) for split in ROWS]
    ids = [cache.ids[:-1][:rows] for cache, rows in zip(caches, ROWS.values(), strict=True)]
    embeddings, rows = (found.cpu() for found in distinct_rows(model, torch.cat(ids)))
    tokens = rows.split([len(each) for each in ids])

    def measured(contexts: Sequence[Tensor]) -> dict[str, Any]:
        train, held_out = map(Stream, contexts, tokens)
        return _measures(config, model.window, train, held_out, embeddings)

    trained = [cache.contexts[1:][:rows].float() for cache, rows in zip(caches, ROWS.values(), strict=True)]
    untrained = {}
    for std in UNTRAINED_STDS:
        block = untrained_block(config.model, std, config.runtime.seed)
        untrained[f"{std:g}"] = measured(read_through(block, block.project_inputs(embeddings), tokens))
    return {**measured(trained), "fresh": untrained, "offsets": model.window.offsets}


def _measures(
    config: ExperimentConfig, window: Window, train: Stream, held_out: Stream, embeddings: Tensor
) -> dict[str, Any]:
    shape, generator = config.model, torch.Generator().manual_seed(config.runtime.seed)
    found = decodability(train, held_out, embeddings, distances(shape.interval, shape.context_window))
    span = memory_span(found)
    return {
        "recall": found,
        "horizon": span,
        "coverage": coverage(shape, window, span),
        "mean_recall": mean_decodability(train, held_out, embeddings, shape.interval),
        "centroid": centroid(held_out.contexts),
        "effective_rank": effective_rank(held_out.contexts, generator),
    }


def untrained_block(shape: ModelConfig, std: float, seed: int) -> ContextBlock:
    """Make a ContextBlock as it is before training, with weights of this standard deviation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = ContextBlock(shape.context_dim, shape.hidden_size)
    block.linear.weight.mul_(std / CONTEXT_WEIGHT_STD)
    return block


def read_through(block: ContextBlock, token_half: Tensor, texts: Sequence[Tensor]) -> list[Tensor]:
    """Compute contexts `[n, context_dim]` of each text, token by token: an untrained block forgets slowly.

    The texts are read side by side; shorter ones are padded with any token, whose contexts are cut off.
    """
    state, contexts = token_half.new_zeros(len(texts), token_half.shape[1]), []
    for tokens in pad_sequence(list(texts)):  # (longest, texts)
        state = block(state, token_half[tokens])
        contexts.append(state)
    read = torch.stack(contexts, dim=1)
    return [each[: len(text)] for each, text in zip(read, texts, strict=True)]
