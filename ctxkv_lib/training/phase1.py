"""Phase 1: train the ContextBlock with OACD until the contexts stop moving.

OACD (Origin-Anchored Centroid Dispersion) spreads contexts around their centroid and holds the centroid
at the origin. Every iteration feeds each position the *previous iteration's* context of the position
before it, so all positions are computed at once.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Phase1Config
from ..model.modeling import ContextBlock
from ..progress import Listener, progress_bar
from .recurrence import draw_contexts


@dataclass(frozen=True)
class Phase1Result:
    """Outcome of Phase 1."""

    iterations: int
    convergence_rate: float
    stop_reason: str  # converged | plateau | max_iterations
    seconds: float


def oacd_loss(contexts: Tensor, centroid_weight: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """`-||X - mean(X)||_F / n + centroid_weight * ||mean(X)||^2` of X `[n, context_dim]`, and its gradient.

    The gradient is taken by hand, `-(X - mean(X)) / (n ||X - mean(X)||_F) + 2 centroid_weight mean(X) / n`:
    one pass instead of autograd's six. Both are multiplied by `scale`.
    """
    count = len(contexts)
    per_row = scale / count
    centroid = contexts.mean(dim=0)
    centred = contexts - centroid
    spread = torch.linalg.vector_norm(centred)
    loss = scale * centroid_weight * centroid.square().sum() - per_row * spread
    spread = spread.clamp(min=torch.finfo(spread.dtype).tiny)  # a single row is its own centroid
    gradient = centred.mul_(-per_row / spread).add_(centroid, alpha=2 * centroid_weight * per_row)
    return loss, gradient


class StoppingRule:
    """Stop at `stop_rate`, or when the rate, above `plateau_rate`, gains too little several times running."""

    def __init__(self, config: Phase1Config) -> None:
        self.config = config
        self.last_rate = 0.0
        self.stalled = 0

    def reason(self, rate: float) -> str | None:
        """Why to stop after an iteration with this convergence rate; None goes on."""
        stalled = rate > self.config.plateau_rate and rate - self.last_rate < self.config.plateau_gain
        self.stalled = self.stalled + 1 if stalled else 0
        self.last_rate = rate
        if rate >= self.config.stop_rate:
            return "converged"
        return "plateau" if self.stalled >= self.config.plateau_patience else None


def train_context_block(
    block: ContextBlock,
    embed_distinct: Tensor,
    tokens: Tensor,
    config: Phase1Config,
    contexts: Tensor,
    generator: torch.Generator,
    listener: Listener,
) -> Phase1Result:
    """Train `block` in place, and leave the last iteration's contexts in `contexts`.

    Args:
        embed_distinct: normed embeddings of the distinct tokens, `[num_distinct, hidden_size]`.
        tokens: int64 `[n]`, the stream as rows of `embed_distinct`.
        contexts: float32 `[n + 1, context_dim]`, padded (see `windows`), on any device; overwritten.
        generator: on the block's device; draws the first contexts and the noise.
        listener: gets one metric an iteration, from iteration 2 on.
    """
    began = time.perf_counter()
    optimizer = torch.optim.Adam(block.parameters(), lr=config.learning_rate)
    draw_contexts(contexts, config.initial_std, generator)
    rule, rate, reason = StoppingRule(config), 0.0, None
    iteration = 1
    with progress_bar(range(2, config.max_iterations + 1), "Phase 1") as bar:
        for iteration in bar:
            tick = time.perf_counter()
            loss, rate = train_iteration(
                block, optimizer, embed_distinct, tokens, contexts, config, generator
            )
            bar.set_postfix(loss=f"{loss:.3f}", converged=f"{rate:.0%}")
            seconds = time.perf_counter() - tick
            listener(_metric(iteration, loss, rate, seconds))
            reason = rule.reason(rate)
            if reason:
                break
    seconds = time.perf_counter() - began
    return Phase1Result(iteration, rate, reason or "max_iterations", seconds)


def _metric(iteration: int, loss: float, rate: float, seconds: float) -> dict[str, float | int | str]:
    return {
        "stage": "phase1",
        "iteration": iteration,
        "loss": loss,
        "convergence_rate": rate,
        "seconds": round(seconds, 4),
    }


def train_iteration(
    block: ContextBlock,
    optimizer: torch.optim.Optimizer,
    embed_distinct: Tensor,
    tokens: Tensor,
    contexts: Tensor,
    config: Phase1Config,
    generator: torch.Generator,
) -> tuple[float, float]:
    """One pass over the stream and one optimiser step; overwrites `contexts`, returns loss and rate."""
    batches = tokens.split(config.batch_size)
    token_half = block.project_tokens(embed_distinct)
    leaf = token_half.detach().requires_grad_()  # its gradient is gathered over batches, then passed on once
    total_loss = torch.zeros((), device=leaf.device)
    converged = torch.zeros((), dtype=torch.int64, device=leaf.device)
    before = contexts[0].to(leaf.device)  # the previous iteration's context of the position before the batch
    start = 0
    optimizer.zero_grad()
    for batch in batches:
        rows = slice(start + 1, start + 1 + len(batch))
        held = contexts[rows].to(leaf.device)
        previous = torch.empty_like(held).normal_(std=config.noise_std, generator=generator)
        previous[0].add_(before)
        previous[1:].add_(held[:-1])
        before = held[-1].clone()
        updated = block(previous, F.embedding(batch, leaf))
        fresh = updated.detach()
        loss, gradient = oacd_loss(fresh, config.centroid_weight, 1 / len(batches))
        updated.backward(gradient)
        moved = F.mse_loss(fresh, held, reduction="none").mean(dim=1)
        contexts[rows] = fresh
        total_loss += loss
        converged += (moved < config.convergence_threshold).sum()
        start += len(batch)
    token_half.backward(leaf.grad)
    torch.nn.utils.clip_grad_norm_(block.parameters(), config.clip_norm)
    optimizer.step()
    return total_loss.item(), converged.item() / len(tokens)
