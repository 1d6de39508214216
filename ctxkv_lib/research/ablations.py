"""What a trained run makes of its contexts: the same weights and positions, read with other windows.

Nothing is trained. Zero contexts are of no kind that the model has met, so they harm, whether it reads what
contexts say or only counts on their being there. Those of another conversation are of the kind it knows, and
wrong: what they do not harm was not read.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..hf.modeling import ContextKVConfig, ContextKVForCausalLM
from ..method.caches import Batch, StreamCache
from ..method.evaluation import perplexity, token_scores
from ..method.windows import slot_positions
from ..runs.inference import binned

SEED = 0  # not the run's: all runs on one validation stream are measured at the same positions
POSITIONS = 1024  # with a full window, drawn for each ablation
REPEATED = 512  # further ones, at which a pair of tokens comes again
SLOT_POSITIONS = 128  # of them for each single slot, of which there are many
HISTORY = (0, 64, 256, 640, math.inf)  # tokens of its own conversation before a position
FREQUENCY = (0, 1, 10, 100, 1000, math.inf)  # of the next token in the training stream

Change = Callable[[Tensor, Tensor], Tensor]  # of windows `[n, slots, context_dim]` at positions `[n]`


class Ablated(StreamCache):
    """A cache whose windows are changed as they are read."""

    def __init__(self, cache: StreamCache, change: Change) -> None:
        super().__init__(**cache.tensors())
        self.change = change

    def gather(self, positions: Tensor, shape: ContextKVConfig) -> Batch:
        batch = super().gather(positions, shape)
        return replace(batch, window=self.change(batch.window, positions))


def zero(window: Tensor, _: Tensor) -> Tensor:
    """Every context is missing, as before the start of a stream."""
    return torch.zeros_like(window)


def shuffled(window: Tensor, _: Tensor) -> Tensor:
    """Each slot gets its context from another position, every slot from a different one.

    A slot keeps the kind of context it is used to; what is lost is all that belongs to the position, and that
    the contexts of a window belong together.
    """
    draw = torch.rand(window.shape[:2], generator=torch.Generator().manual_seed(SEED))
    order = draw.argsort(dim=0).to(window.device)
    return window.gather(0, order[..., None].expand_as(window))


def elsewhere(cache: StreamCache, shape: ContextKVConfig, first: int) -> Change:
    """The whole window of the position half the stream away.

    That is another conversation, unless one makes up half of the stream. Its contexts belong together, but
    not to the position.

    Args:
        first: the first position with a full window; both positions are at or after it.
    """
    count = len(cache) - first

    def change(_: Tensor, positions: Tensor) -> Tensor:
        other = first + (positions - first + count // 2) % count
        return cache.gather(other, shape).window

    return change


def alone(slot: int, others: Change) -> Change:
    """Only this slot has its own context, the others have what `others` gives them."""

    def change(window: Tensor, positions: Tensor) -> Tensor:
        changed = others(window, positions).clone()
        changed[:, slot] = window[:, slot]
        return changed

    return change


@dataclass(frozen=True)
class Read:
    """Scores at n positions, with their own contexts and with others.

    Attributes:
        intact: losses in nats, float32 `[n]`.
        correct: bool `[n]`, whether the likeliest token was the right one.
        other: losses with the other contexts, float32 `[n]`.
    """

    intact: Tensor
    correct: Tensor
    other: Tensor

    def by(self, values: Tensor, edges: Sequence[float]) -> list[dict[str, Any]]:
        """`binned` by `values` `[n]`, with `other_ppl` in each row: the perplexity with other contexts."""
        both = (binned(values, edges, losses, self.correct) for losses in (self.intact, self.other))
        return [{**row, "other_ppl": other["ppl"]} for row, other in zip(*both, strict=True)]


def ablations(
    model: ContextKVForCausalLM, cache: StreamCache, window: int, starts: Tensor, counts: Tensor
) -> dict[str, Any]:
    """`ablations` of the summary: perplexities of a stream with other windows, and by kind of position.

    Args:
        cache: of the validation stream.
        window: tokens of history that a position can reach.
        starts: int64 `[num_conversations]`, the first token of each conversation of the stream.
        counts: int64 `[vocab_size]`, how often each token occurs in the training stream.

    Returns:
        `positions`, their number.
        `changed`, by name of the ablation ("intact" is none, "slot_0" leaves only that slot its own): `ppl`,
        and against intact at the same positions `percent` more of it with its standard error `error`.
        `slots`, for each `slot` that alone is its own: how far `back` it lies (tokens), `ppl`, and `percent`
        and `error` against "elsewhere", where none is.
        `by_history`, `by_frequency`, `by_repetition`: lists of `{from, to, tokens, ppl, accuracy,
        other_ppl}`, where "other" is another conversation's contexts. The last has a row of 0, for tokens
        that form no pair with the one before that stands in the window already, and one of 1, for others.
    """
    first = min(window, len(cache) - 1)
    again = since_last(pairs(cache.ids)) < window
    chosen = _drawn(torch.arange(first, len(cache)), POSITIONS)
    repeated = _drawn(again[first:].nonzero()[:, 0] + first, REPEATED)
    other = elsewhere(cache, model.config, first)
    changes = {"zero": zero, "shuffled": shuffled, "elsewhere": other, "slot_0": alone(0, other)}
    losses = {name: _scores(model, Ablated(cache, change), chosen)[0] for name, change in changes.items()}
    found = Read(*_scores(model, cache, chosen), losses["elsewhere"])
    more = Read(*_scores(model, cache, repeated), _scores(model, Ablated(cache, other), repeated)[0])
    losses = {"intact": found.intact, **losses}
    depth = chosen - starts[torch.searchsorted(starts, chosen, right=True) - 1]
    return {
        "positions": len(chosen),
        "changed": {name: _against(found.intact, each) for name, each in losses.items()},
        "slots": _slots(model, cache, other, chosen, losses["elsewhere"]),
        "by_history": found.by(depth, HISTORY),
        "by_frequency": found.by(counts[cache.ids[chosen + 1].long()], FREQUENCY),
        "by_repetition": [
            *found.by(again[chosen].long(), (0, 1)),
            *more.by(torch.ones_like(repeated), (1, 2)),
        ],
    }


def since_last(codes: Tensor) -> Tensor:
    """How many places before each of `codes` `[n]` the same one stands last; n where it never does."""
    order = codes.argsort(stable=True)
    same = codes[order[1:]] == codes[order[:-1]]
    since = torch.full_like(codes, len(codes))
    since[order[1:][same]] = order.diff()[same]
    return since


def pairs(ids: Tensor) -> Tensor:
    """A number for each token of `ids` `[n + 1]` together with its next: int64 `[n]`."""
    ids = ids.long()
    return ids[:-1] * (ids.max() + 1) + ids[1:]


def _drawn(positions: Tensor, most: int) -> Tensor:
    """So many of `positions` at most, drawn without preference, in order."""
    rows = torch.randperm(len(positions), generator=torch.Generator().manual_seed(SEED))[:most]
    return positions[rows.sort().values]


def _scores(model: ContextKVForCausalLM, cache: StreamCache, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`token_scores` on the CPU; nothing is read where there is no position."""
    if not len(positions):
        return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    losses, correct = token_scores(model, cache, positions)
    return losses.cpu(), correct.cpu()


def _slots(
    model: ContextKVForCausalLM, cache: StreamCache, others: Change, positions: Tensor, none: Tensor
) -> list[dict[str, Any]]:
    """Each slot alone, at some of `positions`, against their losses with `none` of their own contexts."""
    rows = _drawn(torch.arange(len(positions)), SLOT_POSITIONS)
    few, shape = positions[rows], model.config
    back = few[:, None] - slot_positions(few, shape)
    found = []
    for slot, distance in enumerate(back.double().mean(dim=0).tolist()):
        losses, _ = _scores(model, Ablated(cache, alone(slot, others)), few)
        found.append({"slot": slot, "back": distance, **_against(none[rows], losses)})
    return found


def _against(base: Tensor, losses: Tensor) -> dict[str, float]:
    """Perplexity of `losses`, and its change against `base`, losses of the same positions, in percent."""
    change = (losses - base).double()
    error = change.std(correction=0) / math.sqrt(len(change))
    return {
        "ppl": perplexity(losses.double().mean().item()),
        "percent": 100 * (perplexity(change.mean().item()) - 1),
        "error": 100 * error.item(),
    }
