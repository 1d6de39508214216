"""What attention makes of its contexts: perplexity of the same weights at the same positions, other windows.

Nothing is trained. Zero contexts are unlike any that the model was trained on, so they harm even a model that
ignores what contexts say. Contexts of another conversation are familiar and wrong: what they do not harm, the
model did not read.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..hf.inference import binned
from ..method.caches import Batch, StreamCache
from ..method.evaluation import perplexity, token_scores
from ..method.model import ContextKV
from ..method.windows import Window
from ..runs.testing import pairs, since_last

SEED = 0  # not the run's: all runs on one validation stream are measured at the same positions
POSITIONS = 1024  # with a full window, sampled for each ablation
REPEATED = 512  # further ones, at which a pair of tokens occurs again
SLOT_POSITIONS = 128  # of them for each single slot, of which there are many
HISTORY = (0, 64, 256, 640, math.inf)  # tokens of its own conversation before a position
FREQUENCY = (0, 1, 10, 100, 1000, math.inf)  # of the next token in the training stream

Change = Callable[[Tensor, Tensor], Tensor]  # of windows `[n, slots, context_dim]` at positions `[n]`


class Ablated(StreamCache):
    """A cache whose windows are changed when they are read."""

    def __init__(self, cache: StreamCache, change: Change) -> None:
        super().__init__(**cache.tensors())
        self.change = change

    def gather(self, positions: Tensor, window: Window) -> Batch:
        batch = super().gather(positions, window)
        return replace(batch, window=self.change(batch.window, positions))


def zero(window: Tensor, _: Tensor) -> Tensor:
    """Replace every context by zeros, as before the start of a stream."""
    return torch.zeros_like(window)


def shuffled(window: Tensor, _: Tensor) -> Tensor:
    """Give each slot its context from another position, every slot from a different one.

    A slot keeps the kind of context it is used to. It loses what belongs to the position, and that the
    contexts of a window belong together.
    """
    draw = torch.rand(window.shape[:2], generator=torch.Generator().manual_seed(SEED))
    order = draw.argsort(dim=0).to(window.device)
    return window.gather(0, order[..., None].expand_as(window))


def elsewhere(cache: StreamCache, window: Window, first: int) -> Change:
    """Replace the whole window by that of the position half the stream away.

    That is another conversation, unless one makes up half of the stream. Its contexts belong together, but
    not to the position.

    Args:
        first: the first position with a full window; both positions are at or after it.
    """
    count = len(cache) - first

    def change(_: Tensor, positions: Tensor) -> Tensor:
        other = first + (positions - first + count // 2) % count
        return cache.gather(other, window).window

    return change


def alone(slot: int, others: Change) -> Change:
    """Keep only this slot's own context; the other slots get what `others` gives them."""

    def change(window: Tensor, positions: Tensor) -> Tensor:
        changed = others(window, positions).clone()
        changed[:, slot] = window[:, slot]
        return changed

    return change


def ablations(
    model: ContextKV, cache: StreamCache, window: int, starts: Tensor, counts: Tensor
) -> dict[str, Any]:
    """Compute `ablations` of the summary: perplexity with other windows, and by kind of position.

    Args:
        cache: of the validation stream.
        window: tokens of history that a position can reach.
        starts: int64 `[num_conversations]`, the first token of each conversation of the stream.
        counts: int64 `[vocab_size]`, how often each token occurs in the training stream.

    Returns:
        `positions`, their number.
        `changed`, by name of the ablation ("intact" is none, "slot_0" leaves only that slot its own): `ppl`;
        `percent`, its increase over intact at the same positions, and that increase's standard error `error`.
        `slots`, for each `slot` that alone keeps its own context: its mean distance `back` in tokens, `ppl`;
        `percent_vs_elsewhere`, the increase over "elsewhere", where no slot keeps its own, and its `error`.
        `by_history`, `by_frequency`, `by_repetition`: lists of `{from, to, tokens, ppl, accuracy,
        other_ppl}`, the last with another conversation's contexts. `by_repetition` has a row of 0, for tokens
        that form no pair with the one before that occurred in the window, and one of 1, for others.
    """
    first = min(window, len(cache) - 1)
    again = since_last(pairs(cache.ids)) < window
    chosen = _sample(torch.arange(first, len(cache)), POSITIONS)
    repeated = _sample(again[first:].nonzero()[:, 0] + first, REPEATED)
    other = elsewhere(cache, model.window, first)
    changes = {"zero": zero, "shuffled": shuffled, "elsewhere": other, "slot_0": alone(0, other)}
    losses = {name: _scores(model, Ablated(cache, change), chosen)[0] for name, change in changes.items()}
    intact, correct = _scores(model, cache, chosen)
    scores = (intact, correct, losses["elsewhere"])
    at_repeated = (*_scores(model, cache, repeated), _scores(model, Ablated(cache, other), repeated)[0])
    depth = chosen - starts[torch.searchsorted(starts, chosen, right=True) - 1]
    changed = {"intact": intact, **losses}
    return {
        "positions": len(chosen),
        "changed": {name: _increase(intact, each, "percent") for name, each in changed.items()},
        "slots": _slots(model, cache, other, chosen, losses["elsewhere"]),
        "by_history": _binned(depth, HISTORY, *scores),
        "by_frequency": _binned(counts[cache.ids[chosen + 1].long()], FREQUENCY, *scores),
        "by_repetition": [
            *_binned(again[chosen].long(), (0, 1), *scores),
            *_binned(torch.ones_like(repeated), (1, 2), *at_repeated),
        ],
    }


def _sample(positions: Tensor, most: int) -> Tensor:
    """At most this many of `positions`, drawn uniformly, in order."""
    rows = torch.randperm(len(positions), generator=torch.Generator().manual_seed(SEED))[:most]
    return positions[rows.sort().values]


def _scores(model: ContextKV, cache: StreamCache, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`token_scores` on the CPU; empty where there is no position."""
    if not len(positions):
        return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    losses, correct = token_scores(model, cache, positions)
    return losses.cpu(), correct.cpu()


def _binned(
    values: Tensor, edges: Sequence[float], intact: Tensor, correct: Tensor, other: Tensor
) -> list[dict[str, Any]]:
    """`binned` by `values` `[n]`, with the perplexity of the losses `other` as `other_ppl` of each row."""
    both = (binned(values, edges, losses, correct) for losses in (intact, other))
    return [{**row, "other_ppl": changed["ppl"]} for row, changed in zip(*both, strict=True)]


def _slots(
    model: ContextKV, cache: StreamCache, others: Change, positions: Tensor, elsewhere: Tensor
) -> list[dict[str, Any]]:
    """Each slot alone at some of `positions`, compared with their losses `elsewhere`."""
    rows = _sample(torch.arange(len(positions)), SLOT_POSITIONS)
    few = positions[rows]
    back = few[:, None] - model.window.slots(few)
    found = []
    for slot, distance in enumerate(back.double().mean(dim=0).tolist()):
        losses, _ = _scores(model, Ablated(cache, alone(slot, others)), few)
        increase = _increase(elsewhere[rows], losses, "percent_vs_elsewhere")
        found.append({"slot": slot, "back": distance, **increase})
    return found


def _increase(base: Tensor, losses: Tensor, name: str) -> dict[str, float]:
    """Perplexity of `losses`, its increase over `base` at the same positions in percent, standard error."""
    change = (losses - base).double()
    error = change.std(correction=0) / math.sqrt(len(change))
    return {
        "ppl": perplexity(losses.double().mean().item()),
        name: 100 * (perplexity(change.mean().item()) - 1),
        "error": 100 * error.item(),
    }
