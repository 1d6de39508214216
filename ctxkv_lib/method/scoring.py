"""Compute perplexity, accuracy and effective rank."""

import math

import torch
from torch import Tensor

from .callback import Callback
from .model import ContextKV
from .streams import Stream

EVALUATION_ROWS = 1024  # positions per batch


def perplexity(loss: float) -> float:
    """Compute exp(loss), or return infinity if the result is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def token_scores(
    model: ContextKV, stream: Stream, positions: Tensor, callback: Callback | None = None
) -> tuple[Tensor, Tensor]:
    """Compute each prediction's loss in nats, float32 `[n]`, and correctness, bool `[n]`, without dropout."""
    callback, was_training = callback or Callback(), model.training
    model.eval()
    total = -(-len(positions) // EVALUATION_ROWS)
    batches = callback.track(model.batches(stream, positions, EVALUATION_ROWS), "Scoring", total)
    scores = [model.scores(batch) for batch in batches]
    model.train(was_training)
    if not scores:
        return torch.empty(0), torch.empty(0, dtype=torch.bool)
    losses, correct = zip(*scores, strict=True)
    return torch.cat(losses), torch.cat(correct)


def mean_scores(model: ContextKV, stream: Stream, callback: Callback | None = None) -> tuple[float, float]:
    """Compute the mean loss in nats and the accuracy over all positions of a stream."""
    losses, correct = token_scores(model, stream, torch.arange(len(stream)), callback)
    return losses.mean().item(), correct.float().mean().item()


def effective_rank(contexts: Tensor, generator: torch.Generator, max_rows: int = 10_000) -> float:
    """Compute the effective rank (Roy & Vetterli, 2007), divided by context_dim.

    The effective rank is exp(entropy of the normalized singular values). `contexts`, `[n, context_dim]`, are
    not centered. All-zero contexts have rank 0. If there are more than `max_rows` rows, `generator`, which is
    on the CPU, draws a random sample of `max_rows` rows.
    """
    if len(contexts) > max_rows:
        rows = torch.randperm(len(contexts), generator=generator)[:max_rows]
        contexts = contexts[rows.to(contexts.device)]
    values = torch.linalg.svdvals(contexts.float().cpu())
    if not values.any():
        return 0.0
    shares = values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return (entropy.exp() / contexts.shape[-1]).item()
