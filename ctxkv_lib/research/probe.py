"""Decodability of the contexts of a run, compared with those of untrained blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..hf.modeling import TOLERANCE
from ..method.config import ModelConfig
from ..method.contexts import distinct_rows, exact_contexts
from ..method.evaluation import effective_rank
from ..method.model import CONTEXT_WEIGHT_STD, ContextBlock, ContextKV
from ..runs.caches import load_cache
from ..runs.config import ExperimentConfig
from ..runs.run_folder import RunFolder
from .decodability import Stream, centroid, coverage, decodability, mean_decodability, memory_span

ROWS = {"train": 10_000, "val": 5_000}  # tokens of each stream, from its start
UNTRAINED_STDS = (CONTEXT_WEIGHT_STD, 0.01)  # of the weights of the untrained blocks


def distances(interval: int, window: int) -> list[int]:
    """List every distance up to an interval, then each one and a half times the last, within the window."""
    found = list(range(min(interval, window - 1) + 1))
    while (further := max(found[-1] + 1, 3 * found[-1] // 2)) < window:
        found.append(further)
    return found


@torch.no_grad()
def probe(config: ExperimentConfig, folder: RunFolder, model: ContextKV) -> dict[str, Any]:
    """Compute `probe` of the summary on the CPU: of the trained block and, as `fresh`, of untrained blocks.

    The folder holds the run's caches; only token table and shapes of its model are used.
    """
    caches = [load_cache(folder.caches, split) for split in ROWS]
    ids = [cache.ids[:-1][:rows] for cache, rows in zip(caches, ROWS.values(), strict=True)]
    embeddings, rows = (found.cpu() for found in distinct_rows(model, torch.cat(ids)))
    tokens = rows.split([len(each) for each in ids])
    shape = config.model
    window = min(shape.context_window, *(1 + len(each) // 2 for each in tokens))  # half are left to fit

    def measured(contexts: Sequence[Tensor]) -> dict[str, Any]:
        train, held_out = map(Stream, contexts, tokens)
        found = decodability(train, held_out, embeddings, distances(shape.interval, window))
        span = memory_span(found)
        generator = torch.Generator().manual_seed(config.runtime.seed)
        return {
            "recall": found,
            "horizon": span,
            "coverage": coverage(shape, model.window, span),
            "mean_recall": mean_decodability(train, held_out, embeddings, min(shape.interval, window)),
            "centroid": centroid(held_out.contexts),
            "effective_rank": effective_rank(held_out.contexts, generator),
        }

    trained = [cache.contexts[1:][: len(each)].float() for cache, each in zip(caches, ids, strict=True)]
    untrained = {}
    for std in UNTRAINED_STDS:
        block = untrained_block(shape, std, config.runtime.seed)
        inputs = block.project_inputs(embeddings)
        untrained[f"{std:g}"] = measured([exact_contexts(block, inputs, n, TOLERANCE)[0][1:] for n in tokens])
    return {**measured(trained), "fresh": untrained, "offsets": model.window.offsets}


of_run = probe  # what `measure` looks for in the module of a measurement


def untrained_block(shape: ModelConfig, std: float, seed: int) -> ContextBlock:
    """Make an untrained ContextBlock with weights of this standard deviation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = ContextBlock(shape.context_dim, shape.hidden_size)
    block.linear.weight.data.mul_(std / CONTEXT_WEIGHT_STD)
    return block
