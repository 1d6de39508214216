"""Perplexity, accuracy and effective rank."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ranks
from ..hf.modeling import ContextKVForCausalLM
from ..progress import progress_bar
from ..runs.placement import Pieces
from .caches import StreamCache

EVALUATION_ROWS = 1024  # positions at a time


@dataclass(frozen=True)
class Score:
    """Next-token quality on a stream."""

    loss: float  # nats a token
    accuracy: float  # share of positions whose most likely token is the right one

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def token_scores(
    model: ContextKVForCausalLM, cache: StreamCache, positions: Tensor, pieces: Pieces | None = None
) -> tuple[Tensor, Tensor]:
    """Loss in nats and correctness of each prediction, float32 and bool `[n]`, without dropout.

    Of several processes each takes a part of the positions, and all get all of it.

    Args:
        pieces: where to keep into how many pieces memory makes it cut batches; None begins with whole ones.
    """
    pieces = pieces or Pieces("evaluation")
    was_training = model.training
    model.eval()
    share, scores = ranks.share(len(positions)), torch.zeros(2, len(positions), device=model.device)
    done, total = share.start, -(-(share.stop - share.start) // EVALUATION_ROWS)
    parts = _parts(model, cache, positions[share], pieces)
    for losses, correct in progress_bar(parts, "Validation", total=total):
        scores[:, done : done + len(losses)] = torch.stack([losses, correct.to(losses)])
        done += len(losses)
    ranks.sum_([scores])
    model.train(was_training)
    return scores[0], scores[1].bool()


def _parts(
    model: ContextKVForCausalLM, cache: StreamCache, positions: Tensor, pieces: Pieces
) -> Iterator[tuple[Tensor, Tensor]]:
    """Losses and correctness of `positions`, a batch at a time, in as many pieces as memory asks for."""
    done = 0
    while done < len(positions):
        try:
            for batch in cache.batches(positions[done:], EVALUATION_ROWS, model, pieces.count):
                hidden, _ = batch.attend(model)
                found = model.losses(hidden, batch.tokens, batch.targets)
                done += len(batch.targets)
                yield found
        except (RuntimeError, MemoryError) as error:
            pieces.double(error, EVALUATION_ROWS)


def evaluate(model: ContextKVForCausalLM, cache: StreamCache, pieces: Pieces | None = None) -> Score:
    """Mean loss and accuracy over every position of a cached stream; `pieces` as in `token_scores`."""
    losses, correct = token_scores(model, cache, torch.arange(len(cache)), pieces)
    return Score(losses.mean().item(), correct.float().mean().item())


def effective_rank(contexts: Tensor, max_rows: int, generator: torch.Generator) -> float:
    """exp(entropy of the normalised singular values) as a share of context_dim (Roy & Vetterli, 2007).

    Args:
        contexts: `[n, context_dim]`, not centred.
        max_rows: at most so many rows are drawn at random.
        generator: a CPU generator.
    """
    if len(contexts) > max_rows:
        rows = torch.randperm(len(contexts), generator=generator)[:max_rows]
        contexts = contexts[rows.to(contexts.device)]
    values = torch.linalg.svdvals(contexts.float().cpu())
    shares = values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return (entropy.exp() / contexts.shape[-1]).item()
