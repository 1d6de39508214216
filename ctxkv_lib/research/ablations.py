"""Ablations of contexts: perplexity of the same weights at the same positions with other windows.

Nothing is trained. Zero contexts never occur in training, so they harm even a model that ignores the content
of contexts. Contexts of another conversation are in distribution but wrong: they harm only a model that reads
them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..data.conversations import load_conversations
from ..data.counts import count_tokens
from ..data.tokens import load_tokenizer, validation_stream
from ..hf.inference import binned
from ..method.caches import Batch, StreamCache
from ..method.evaluation import perplexity
from ..method.model import ContextKV
from ..runs.caches import load_cache, load_ids
from ..runs.config import ExperimentConfig
from ..runs.run_folder import RunFolder
from .repeated_pairs import pairs, since_last

SEED = 0  # not the run's, so that all runs on a validation stream are measured at the same positions
POSITIONS = 1024  # with a full window, sampled for each ablation
REPEATED = 512  # further ones, at which a pair of tokens occurs again
SLOT_POSITIONS = 128  # of them for each single slot, of which there are many
HISTORY = (0, 64, 256, 640, math.inf)  # tokens of its own conversation before a position
FREQUENCY = (0, 1, 10, 100, 1000, math.inf)  # of the next token in the training stream


def of_run(config: ExperimentConfig, folder: RunFolder, model: ContextKV) -> dict[str, Any]:
    """Compute `ablations` of the summary on a run's caches."""
    conversations = load_conversations(config.data, "validation")
    starts = validation_stream(conversations, load_tokenizer(config.data.tokenizer)).starts
    counts = count_tokens(load_ids(folder.caches, "train"), model.wte.num_embeddings)
    held_out = load_cache(folder.caches, "val")
    return ablations(model, held_out, config.model.context_window, starts, counts)


@torch.no_grad()
def ablations(
    model: ContextKV, cache: StreamCache, window: int, starts: Tensor, counts: Tensor
) -> dict[str, Any]:
    """Compute perplexity with other windows, and by kind of position.

    Args:
        model: in evaluation mode.
        cache: of the validation stream.
        window: tokens of history that a position can reach.
        starts: int64 `[num_conversations]`, the first token of each conversation of the stream.
        counts: int64 `[vocab_size]`, how often each token occurs in the training stream.

    Returns:
        `positions`, their number.
        `changed`, by name of the ablation ("intact" is none, "elsewhere" is another conversation's window,
        "slot_0" leaves only that slot its own): `ppl`; `percent`, its increase over intact at the same
        positions, and that increase's standard error `error`.
        `slots`, for each `slot` that alone keeps its own context, at `SLOT_POSITIONS` of the positions: its
        mean distance `back` in tokens, `ppl`; `percent_vs_elsewhere`, the increase over "elsewhere", where
        no slot keeps its own, and its `error`.
        `by_history`, `by_frequency`, `by_repetition`: lists of `{from, to, tokens, ppl, accuracy,
        other_ppl}`, the last with another conversation's contexts. `by_repetition` has a row of 0, for tokens
        that form no pair with the one before that occurred in the window, and one of 1, for others.
    """
    first = min(window, len(cache) - 1)
    again = since_last(pairs(cache.ids)) < min(window, len(cache))  # len(cache) if a pair is new
    chosen = _sample(torch.arange(first, len(cache)), POSITIONS)
    repeated = _sample(again[first:].nonzero()[:, 0] + first, REPEATED)
    batch, other = gather_with_other(model, cache, first, chosen)
    windows = {
        "intact": batch.window,
        "zero": batch.window.new_zeros(()).expand_as(batch.window),
        "shuffled": shuffled(batch.window),
        "elsewhere": other,
        "slot_0": _only_own(0, batch, other),
    }
    scores = {name: window_scores(model, batch, each) for name, each in windows.items()}
    losses = {name: found for name, (found, _) in scores.items()}
    both = (*scores["intact"], losses["elsewhere"])
    batch, other = gather_with_other(model, cache, first, repeated)
    at_repeated = (*window_scores(model, batch, batch.window), window_scores(model, batch, other)[0])
    depth = chosen - starts[torch.searchsorted(starts, chosen, right=True) - 1]
    rows = _sample(torch.arange(len(chosen)), SLOT_POSITIONS)
    few = chosen[rows]
    batch, other = gather_with_other(model, cache, first, few)
    alone = [window_scores(model, batch, _only_own(slot, batch, other))[0] for slot in range(other.shape[1])]
    back = (few[:, None] - model.window.slots(few)).double().mean(dim=0).tolist()
    return {
        "positions": len(chosen),
        "changed": {name: _increase(losses["intact"], each, "percent") for name, each in losses.items()},
        "slots": [
            {"slot": slot, "back": back[slot]}
            | _increase(losses["elsewhere"][rows], each, "percent_vs_elsewhere")
            for slot, each in enumerate(alone)
        ],
        "by_history": _binned(depth, HISTORY, *both),
        "by_frequency": _binned(counts[cache.ids[chosen + 1].long()], FREQUENCY, *both),
        "by_repetition": [
            *_binned(again[chosen].long(), (0, 1), *both),
            *_binned(torch.ones_like(repeated), (1, 2), *at_repeated),
        ],
    }


def shuffled(window: Tensor) -> Tensor:
    """Give each slot of windows `[n, slots, context_dim]` its context from a different position.

    The distribution of each slot is unchanged; what depends on position and window is lost.
    """
    draw = torch.rand(window.shape[:2], generator=torch.Generator().manual_seed(SEED))
    order = draw.argsort(dim=0).to(window.device)
    return window.gather(0, order[..., None].expand_as(window))


def gather_with_other(
    model: ContextKV, cache: StreamCache, first: int, positions: Tensor
) -> tuple[Batch, Tensor]:
    """Gather `positions`, and windows half the stream away, which are usually of another conversation."""
    count = len(cache) - first
    away = first + (positions - first + count // 2) % count
    batch, other = (cache.gather(each, model.window).to(model.device) for each in (positions, away))
    return batch, other.window


def _sample(positions: Tensor, most: int) -> Tensor:
    """Draw at most so many of `positions` uniformly, in order."""
    rows = torch.randperm(len(positions), generator=torch.Generator().manual_seed(SEED))[:most]
    return positions[rows.sort().values]


def window_scores(model: ContextKV, batch: Batch, window: Tensor) -> tuple[Tensor, Tensor]:
    """Compute loss and correctness of each prediction with this window, on the CPU."""
    hidden, _ = replace(batch, window=window).attend(model)
    losses, correct = model.losses(hidden, batch.tokens, batch.targets)
    return losses.cpu(), correct.cpu()


def _binned(
    values: Tensor, edges: Sequence[float], intact: Tensor, correct: Tensor, other: Tensor
) -> list[dict[str, Any]]:
    """Compute `binned` by `values` `[n]`, with the perplexity of the losses `other` as `other_ppl`."""
    both = (binned(values, edges, losses, correct) for losses in (intact, other))
    return [{**row, "other_ppl": changed["ppl"]} for row, changed in zip(*both, strict=True)]


def _only_own(slot: int, batch: Batch, other: Tensor) -> Tensor:
    """Take one slot of the positions' own windows, and all others of the windows `other`."""
    is_own = torch.arange(other.shape[1], device=other.device)[:, None] == slot
    return torch.where(is_own, batch.window, other)


def _increase(base: Tensor, losses: Tensor, name: str) -> dict[str, float]:
    """Compute the perplexity of `losses`, and their increase over `base` in percent with standard error."""
    change = (losses - base).double()
    ratio, error = perplexity(change.mean().item()), change.std(correction=0) / math.sqrt(len(change))
    return {
        "ppl": perplexity(losses.double().mean().item()),
        name: 100 * (ratio - 1),
        "error": 100 * ratio * error.item(),
    }
