"""Multi-query associative recall: accuracy of a key's value, by distance."""

from typing import Any

import torch
from torch import Tensor

from ..data.recall import KEYS, pairs_in
from ..data.tokens import load_tokenizer
from ..hf.inference import binned
from ..method.caches import StreamCache
from ..method.evaluation import perplexity, token_scores
from ..method.model import ContextKV
from ..runs.caches import load_cache
from ..runs.config import ExperimentConfig
from ..runs.long_run import LongRun
from ..runs.rows import as_read
from ..runs.run_folder import RunFolder
from .repeated_pairs import since_last

MOST = 4096  # answers that are scored


def of_run(config: ExperimentConfig, folder: RunFolder, model: ContextKV) -> dict[str, Any]:
    """Compute `recall_task` of the summary on a run's validation stream."""
    tokenizer, window = load_tokenizer(config.data.tokenizer), config.data.recall_window
    keys = torch.tensor([tokenizer.encode(f" {key}")[0] for key in KEYS])
    held_out = as_read(model, load_cache(folder.caches, "val"), trained=False)
    return {**recall_task(model, held_out, keys, window), "values": pairs_in(window)}


def recall_task(model: ContextKV, cache: StreamCache, keys: Tensor, window: int) -> dict[str, Any]:
    """Score the answers in a stream of source `recall`.

    Args:
        cache: of the validation stream.
        keys: int64 `[num_keys]`, tokens whose second occurrence asks for the value.
        window: largest distance back to their values, in tokens.

    Returns:
        `answers`, their number; `accuracy`, `ppl`; `by_distance` and `by_place`, lists of `{from, to,
        tokens, ppl, accuracy}`: by the tokens from the value to the key that asks for it, and by how many
        tokens the nearest slot has read since that value (with slots an interval apart: the distance modulo
        the interval; from an interval on, in one row).
    """
    positions, distances = (each[:MOST] for each in answers(cache.ids, keys, window))
    loop = LongRun("the recall task", model.device, lambda _: None)
    losses, correct = (scores.cpu() for scores in token_scores(model, cache, positions, loop))
    interval = model.config.interval
    doubled = (interval << power for power in range((window // interval).bit_length()))
    edges = sorted({1, *doubled, window})
    places = sorted({*range(min(interval, window) + 1), window})
    return {
        "answers": len(positions),
        "accuracy": correct.double().mean().item(),
        "ppl": perplexity(losses.double().mean().item()),
        "by_distance": binned(distances, edges, losses, correct),
        "by_place": binned(read_since(positions, distances, model), places, losses, correct),
    }


def answers(ids: Tensor, keys: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Find the positions where keys ask, and the distances back to their values: int64 `[n]` each."""
    inputs = ids[:-1].long()
    at = torch.isin(inputs, keys).nonzero()[:, 0]
    since = since_last(inputs)[at]
    asks = since <= window
    return at[asks], since[asks] - 1


def read_since(positions: Tensor, distances: Tensor, model: ContextKV) -> Tensor:
    """Count the tokens between one so far back and the nearest slot at or after it: int64 `[n]`."""
    behind = model.window.slots(positions) - (positions - distances)[:, None]  # (n, slots)
    return behind.where(behind >= 0, distances[:, None]).amin(dim=1)
