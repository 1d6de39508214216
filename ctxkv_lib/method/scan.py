"""The contexts that reading token by token gives, from segments of a stream that are read in lock-step.

Contexts are padded here: row i is the context before token i, row i + 1 the one after it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT = 256  # tokens of a segment at least
# Segments side by side at most: fewer cost more steps, more cost more of what a block that forgets slowly has
# to read again. And readers that may be few enough: on a CPU the rows of a step begin to cost more than the
# step itself at some thirty, on a GPU at some thousands.
SEGMENTS, FEW = {"cpu": 256}, {"cpu": 32}
MANY = 2048  # of both, on a GPU
BURN_IN = 48  # tokens that a segment reads before its own; few trained blocks need more to forget their start
LOOK_EVERY = 16  # tokens read on before they are held against what was there
SPARSER = 4  # one of so many goes on where most readers met nothing
MEETING = 1 / 4  # of the tolerance: what readers leave apart may add up where a block forgets slowly
TWINS, TWIN_TOKENS = 8, 512  # readers whose rounding is measured, over so many tokens


# Next contexts `[n, context_dim]` from the previous ones and the tokens' halves.
Block = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stream:
    """Tokens to read, and what reads them.

    Attributes:
        token_half: `ContextBlock.project_tokens` of distinct tokens, `[num_distinct, context_dim]`.
        tokens: int64 `[n]`, rows of `token_half`.
        begins: int64 `[n]`, where a token begins another sequence the row of `initial` from which it is read,
            elsewhere -1; None: the stream is one sequence.
        initial: `[any, context_dim]`.
    """

    block: Block
    token_half: Tensor
    tokens: Tensor
    begins: Tensor | None = None
    initial: Tensor | None = None

    def read(self, state: Tensor, positions: Tensor, count: int) -> Tensor:
        """Contexts `[count, m, context_dim]` after each of the `count` tokens from `positions` `[m]` on.

        Beyond the end the last token is read again and again.
        """
        ahead = positions + torch.arange(count, device=positions.device)[:, None]
        ahead = ahead.clamp(max=len(self.tokens) - 1)  # (count, m)
        read = []
        for halves, here in zip(self.token_half[self.tokens[ahead]], ahead, strict=True):
            state = self.block(self._begun(state, here), halves)
            read.append(state)
        return torch.stack(read)

    def _begun(self, state: Tensor, positions: Tensor) -> Tensor:
        if self.begins is None or self.initial is None:
            return state
        row = self.begins[positions]
        return torch.where((row >= 0)[:, None], self.initial[row.clamp(min=0)], state)


@torch.no_grad()
def walk(stream: Stream, contexts: Tensor, tolerance: float) -> float:
    """Overwrite `contexts[1:]` with what reading the stream token by token from `contexts[0]` gives.

    A trained block forgets its start, so the stream is cut into segments that walk in lock-step, each reading
    some tokens before its own. Where a segment does not start as the one before it ends there is a seam, from
    which is read again, all of them in lock-step, until that meets what is there already. A reader that comes
    as far as the next one's start has changed it, so there is a seam again; if that happens to most, fewer go
    further. The first reader is right each time, so this ends, at the latest with one that reads everything.

    Args:
        contexts: padded, `[n + 1, context_dim]`, of the dtype and on the device of `token_half`.
        tolerance: largest difference of any component that may be left at a seam. If rounding alone makes a
            larger one, which is measured where most readers met nothing, that may be left.

    Returns:
        the largest difference left.
    """
    seams, left = _walk_segments(stream, contexts, tolerance)
    meeting, every, measured = MEETING * tolerance, 1, False
    while len(seams):
        readers = seams[::every].contiguous()
        ends = torch.cat([readers[1:], readers.new_tensor([len(stream.tokens)])])
        stopped, gap = _read_on(stream, contexts, contexts[readers], readers, ends, meeting)
        gap[-1] = 0 if stopped[-1] == ends[-1] else gap[-1]  # nothing follows the end of the stream
        met = gap <= meeting
        left = max(left, _largest(gap[met]))
        passed = stopped[torch.searchsorted(readers, seams, right=True) - 1]
        not_reached = seams[(seams >= passed) & ~torch.isin(seams, readers)]
        seams = torch.cat([not_reached, ends[~met]]).sort().values
        most_met = 2 * int(met.sum()) >= len(met)
        if not most_met and not measured:
            meeting, measured = max(meeting, _rounding(stream, contexts, readers[~met], ends[~met])), True
        every = 1 if most_met or len(readers) <= FEW.get(contexts.device.type, MANY) else SPARSER
    return left


@torch.no_grad()
def walk_columns(
    block: Block, token_half: Tensor, tokens: Tensor, read: Tensor, state: Tensor, tolerance: float
) -> Tensor:
    """Contexts `[batch, length, context_dim]` after each column, by one walk through all rows of a batch.

    Args:
        tokens: int64 `[batch, length]`, rows of `token_half`.
        read: bool `[batch, length]`; a column that is not read leaves the context as it is.
        state: contexts before the first column, `[batch, context_dim]`.
        tolerance: as `walk` takes it.
    """
    counts = read.sum(dim=1)
    first = counts.cumsum(0) - counts  # of each row's tokens in the stream of all
    begins = torch.full_like(tokens[read], -1)
    some = counts > 0
    begins[first[some]] = some.nonzero().squeeze(1)
    contexts = state.new_empty(len(begins) + 1, state.shape[1])
    contexts[0] = state[0]
    if len(begins):
        several = (begins, state) if len(tokens) > 1 else ()  # one row begins where `contexts` do
        walk(Stream(block, token_half, tokens[read], *several), contexts, tolerance)
    seen = read.cumsum(dim=1)
    after = contexts[first[:, None] + seen]
    return after if read[:, 0].all() else torch.where((seen > 0)[..., None], after, state[:, None])


def _walk_segments(stream: Stream, contexts: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """Overwrite `contexts[1:]`; returns the seams, and the largest difference where there is none."""
    count, width = len(stream.tokens), contexts.shape[-1]
    length = max(SEGMENT, -(-count // SEGMENTS.get(contexts.device.type, MANY)))
    first = torch.arange(0, count, length, device=contexts.device)
    burn_in = min(BURN_IN, length)
    state = stream.read(contexts[:1].expand(len(first), width), (first - burn_in).clamp(min=0), burn_in)[-1]
    state[0] = contexts[0]
    starts = state
    whole = count // length
    walked, tail = contexts[1:].split([whole * length, count - whole * length])
    walked = walked.view(whole, length, width)
    for step in range(0, length, LOOK_EVERY):
        read = stream.read(state, first + step, min(LOOK_EVERY, length - step))
        state = read[-1]
        walked[:, step : step + len(read)] = read[:, :whole].transpose(0, 1)
        rest = tail[step : step + len(read)]
        rest.copy_(read[: len(rest), -1])
    apart = _apart(starts[1:], contexts[first[1:]])
    agrees = apart <= tolerance
    return first[1:][~agrees], _largest(apart[agrees])


def _read_on(
    stream: Stream,
    contexts: Tensor,
    state: Tensor,
    at: Tensor,
    ends: Tensor,
    tolerance: float,
    overwrite: bool = True,
) -> tuple[Tensor, Tensor]:
    """Read on, each reader until it meets what `contexts` hold, or to its end.

    Args:
        state: contexts before the readers' first tokens, `[m, context_dim]`.
        at: their first tokens, int64 `[m]`.
        ends: the tokens before which they stop at the latest, int64 `[m]`.

    Returns:
        before which token each stopped, and how far it was then from what `contexts` held.
    """
    stopped, gap = ends.clone(), state.new_zeros(len(state))
    going = torch.arange(len(at), device=at.device)
    while len(going):
        count = min(LOOK_EVERY, int((ends[going] - at).min()))
        read = stream.read(state, at, count)
        rows = at + 1 + torch.arange(count, device=at.device)[:, None]
        at, state = at + count, read[-1]
        gap[going], stopped[going] = _apart(state, contexts[at]), at
        if overwrite:
            contexts[rows] = read
        further = ~(gap[going] <= tolerance) & (at < ends[going])
        going, at, state = going[further], at[further], state[further]
    return stopped, gap


def _rounding(stream: Stream, contexts: Tensor, at: Tensor, ends: Tensor) -> float:
    """How far readers of the same tokens come apart that start a rounding apart: a few, from `at` on."""
    chosen = slice(None, None, -(-len(at) // TWINS))
    at = at[chosen] + 1  # where the readers that were there are on their own way
    ends = torch.minimum(ends[chosen], at + TWIN_TOKENS)
    begun = contexts[at]
    either_way = (-1) ** torch.arange(begun.shape[1], device=at.device)
    twins = begun + begun * torch.finfo(begun.dtype).eps * either_way
    _, gap = _read_on(stream, contexts, twins, at, ends, -1.0, overwrite=False)
    return _largest(gap)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().amax(dim=1)


def _largest(apart: Tensor) -> float:
    return apart.max().item() if len(apart) else 0.0
