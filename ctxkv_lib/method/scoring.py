"""Compute perplexity, accuracy and effective rank."""

import math

import torch
from torch import Tensor

from .caches import Cache
from .loop import Loop
from .model import ContextKV

EVALUATION_ROWS = 1024  # positions per batch


def perplexity(loss: float) -> float:
    """Compute exp(loss), or return infinity if the result is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def token_scores(
    model: ContextKV, cache: Cache, positions: Tensor, loop: Loop | None = None
) -> tuple[Tensor, Tensor]:
    """Compute each prediction's loss in nats, float32 `[n]`, and correctness, bool `[n]`, without dropout."""
    loop, was_training = loop or Loop(), model.training
    model.eval()
    shard = loop.shard(len(positions))
    scores = torch.zeros(len(positions), 2, device=model.device)
    done, total = shard.start, -(-(shard.stop - shard.start) // EVALUATION_ROWS)
    for batch in loop.track(model.batches(cache, positions[shard], EVALUATION_ROWS), "Scoring", total):
        losses, correct = model.scores(batch)
        scores[done : done + len(batch)] = torch.stack([losses, correct.to(losses)], dim=1)
        done += len(batch)
    loop.all_reduce([scores])
    model.train(was_training)
    losses, correct = scores.T.contiguous()  # a strided tensor's sum rounds differently
    return losses, correct.bool()


def mean_scores(model: ContextKV, cache: Cache, loop: Loop | None = None) -> tuple[float, float]:
    """Compute the mean loss in nats and the accuracy over all positions of a cached stream."""
    losses, correct = token_scores(model, cache, torch.arange(len(cache)), loop)
    return losses.mean().item(), correct.float().mean().item()


def effective_rank(contexts: Tensor, generator: torch.Generator, max_rows: int = 10_000) -> float:
    """Compute the effective rank (Roy & Vetterli, 2007), divided by context_dim.

    The effective rank is exp(entropy of the normalised singular values). `contexts`, `[n, context_dim]`, are
    not centred. All-zero contexts have rank 0. If there are more than `max_rows` rows, `generator`, which is
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
