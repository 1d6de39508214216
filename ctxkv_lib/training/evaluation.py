"""Perplexity, accuracy and effective rank."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.modeling import ContextKVForCausalLM
from ..progress import progress_bar
from .caches import StreamCache
from .losses import frozen_head_cross_entropy

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
def token_scores(model: ContextKVForCausalLM, cache: StreamCache, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats and correctness of each prediction, float32 and bool `[n]`, without dropout."""
    was_training = model.training
    model.eval()
    losses, correct = [], []
    batches = cache.batches(positions, EVALUATION_ROWS, model)
    for batch in progress_bar(batches, "Validation", total=-(-len(positions) // EVALUATION_ROWS)):
        hidden, _ = batch.attend(model)
        part_losses, part_correct = frozen_head_cross_entropy(hidden, model.wte.weight, batch.targets)
        losses.append(part_losses)
        correct.append(part_correct)
    model.train(was_training)
    return torch.cat(losses), torch.cat(correct)


def evaluate(model: ContextKVForCausalLM, cache: StreamCache) -> Score:
    """Mean loss and accuracy over every position of a cached stream."""
    losses, correct = token_scores(model, cache, torch.arange(len(cache)))
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
