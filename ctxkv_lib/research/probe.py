"""What the contexts of a run remember, beside those of blocks that nothing was trained in."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..hf.modeling import ContextKVConfig, ContextKVForCausalLM
from ..method.caches import load_cache
from ..method.evaluation import effective_rank
from ..method.model import CONTEXT_WEIGHT_STD, ContextBlock
from ..runs.config import ExperimentConfig
from ..runs.run_folder import RunFolder
from .decodability import Stream, centroid, coverage, horizon, mean_recall, recall

ROWS = {"train": 10_000, "val": 5_000}  # tokens read of each stream, from its start
FRESH_STDS = (CONTEXT_WEIGHT_STD, 0.01)  # of the weights of the blocks that stand beside the trained one


def distances(interval: int, window: int) -> list[int]:
    """Every one up to an interval, then each half as far again, within the window."""
    found = list(range(min(interval, window - 1) + 1))
    while (further := 3 * found[-1] // 2) < window and further > found[-1]:
        found.append(further)
    return found


@torch.no_grad()
def probe(config: ExperimentConfig, folder: RunFolder, model: ContextKVForCausalLM) -> dict[str, Any]:
    """`probe` of the summary: the trained block's measures, and as `fresh` those of untrained ones.

    All of it is computed on the CPU, in half a minute at most.

    Args:
        folder: of a run that has its caches.
        model: of the run, for its token table and shapes.
    """
    caches = {split: load_cache(folder.caches, split) for split in ROWS}
    ids = {split: cache.ids[:-1][: ROWS[split]] for split, cache in caches.items()}
    distinct, rows = torch.cat(list(ids.values())).unique(return_inverse=True)
    embeddings = model.embed(distinct.to(model.device)).cpu()
    tokens = dict(zip(ids, rows.split([len(each) for each in ids.values()]), strict=True))
    trained = {
        split: Stream(caches[split].contexts[1 : len(row) + 1].float(), row) for split, row in tokens.items()
    }
    found = _measures(config, trained, embeddings)
    fresh = {}
    for std in FRESH_STDS:
        block = fresh_block(model.config, std, config.runtime.seed)
        half = block.project_tokens(embeddings)
        contexts = read_through(block, half, list(tokens.values()))
        streams = {
            split: Stream(*read) for split, *read in zip(tokens, contexts, tokens.values(), strict=True)
        }
        fresh[f"{std:g}"] = _measures(config, streams, embeddings)
    return {**found, "fresh": fresh}


def _measures(config: ExperimentConfig, streams: dict[str, Stream], embeddings: Tensor) -> dict[str, Any]:
    train, held_out = streams["train"], streams["val"]
    shape, generator = config.model, torch.Generator().manual_seed(config.runtime.seed)
    found = recall(train, held_out, embeddings, distances(shape.interval, shape.context_window))
    reach = horizon(found)
    return {
        "recall": found,
        "horizon": reach,
        "coverage": coverage(shape, reach),
        "mean_recall": mean_recall(train, held_out, embeddings, shape.interval),
        "centroid": centroid(held_out.contexts),
        "effective_rank": effective_rank(held_out.contexts, config.phase1.rank_rows, generator),
    }


def fresh_block(shape: ContextKVConfig, std: float, seed: int) -> ContextBlock:
    """A ContextBlock as it is before training, with weights of this standard deviation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = ContextBlock(shape)
    block.scale_weights(std)
    return block


def read_through(block: ContextBlock, token_half: Tensor, texts: Sequence[Tensor]) -> list[Tensor]:
    """Contexts `[n, context_dim]` of each text, read token by token: what forgets slowly has no shorter way.

    The texts are read side by side; shorter ones go on with any token, which is cut off.
    """
    lengths = [len(text) for text in texts]
    columns = pad_sequence(list(texts))  # (longest, texts)
    state, contexts = token_half.new_zeros(len(texts), token_half.shape[1]), []
    for tokens in columns:
        state = block(state, token_half[tokens])
        contexts.append(state)
    read = torch.stack(contexts, dim=1)
    return [each[:length] for each, length in zip(read, lengths, strict=True)]
