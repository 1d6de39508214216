"""Phase 1: train the ContextBlock with OACD until its contexts converge.

OACD (Origin-Anchored Centroid Dispersion) spreads contexts around their centroid and anchors the centroid at
the origin. In every iteration, each position starts from the context that the *previous iteration* computed
for the position before it, so all positions are computed at once.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block, attribute_or_default, project_inputs
from .callback import Callback, Diverged
from .config import Phase1Config
from .contexts import draw_contexts
from .objective import Objective, TokenRows

SAMPLE = 512  # how many contexts the metrics of an iteration describe


@dataclass(frozen=True)
class Phase1Result:
    iterations: int
    convergence_rate: float | None
    stop_reason: str  # converged | plateau | max_iterations | untrained
    seconds: float


UNTRAINED = Phase1Result(0, None, "untrained", 0.0)


def oacd_loss(contexts: Tensor, centroid_weight: float) -> Tensor:
    """Compute `-||X - mean(X)||_F / n + centroid_weight * ||mean(X)||^2` for X `[n, context_dim]`."""
    centroid = contexts.mean(dim=0)
    spread = torch.linalg.vector_norm(contexts - centroid)
    return centroid_weight * centroid.square().sum() - spread / len(contexts)


class StoppingRule:
    """Stops Phase 1 once enough positions have converged, or once their share stops growing."""

    def __init__(self, config: Phase1Config) -> None:
        self.config, self.last_rate, self.stalled = config, -math.inf, 0

    def update(self, rate: float) -> str | None:
        """Count an iteration with convergence rate `rate`. Return the reason to stop, or None to continue."""
        stalled = rate > self.config.plateau_rate and rate - self.last_rate < self.config.plateau_gain
        self.stalled, self.last_rate = self.stalled + 1 if stalled else 0, rate
        if rate >= self.config.stop_rate:
            return "converged"
        return "plateau" if self.stalled >= self.config.plateau_patience else None


def train_context_block(
    block: nn.Module,
    embeddings: Tensor,
    tokens: Tensor,
    context_dim: int,
    config: Phase1Config,
    generator: torch.Generator,
    loss: Callable[..., Tensor] | None = None,
    callback: Callback | None = None,
    next_tokens: TokenRows | None = None,
) -> tuple[Phase1Result, Tensor | None]:
    """Train `block` in place. Raises Diverged if the loss or the weights are no longer finite.

    Args:
        embeddings: normed embeddings of the distinct tokens, `[num_distinct, hidden_size]`.
        tokens: int64 `[n]`, the stream as row numbers in `embeddings`.
        generator: draws the initial contexts and the noise; must be on the block's device.
        loss: an objective that replaces OACD. It is a function, or a module on the block's device whose
            weights are also trained in place. See `objective` for its arguments.
        next_tokens: the token after each of `tokens`; needed only if `loss` asks for `next_embeddings`.

    Returns:
        The outcome, and the padded contexts (see `windows`) of the last iteration, float32
        `[n + 1, context_dim]`. The contexts are None if nothing is trained.
    """
    callback, weights = callback or Callback(), [*block.parameters()]
    attribute_or_default(block, "init_weights", Block)(embeddings, tokens, config)
    if not weights or not config.max_iterations:
        return UNTRAINED, None
    loss = partial(oacd_loss, centroid_weight=config.centroid_weight) if loss is None else loss
    objective = Objective(loss, (embeddings, tokens), next_tokens)
    optimizer = torch.optim.Adam([*weights, *objective.weights], lr=config.learning_rate)
    rule = StoppingRule(config)
    contexts = draw_contexts(len(tokens), context_dim, config.initial_std, generator)
    total, planned = 0.0, range(2, config.max_iterations + 1)  # iteration 1 is the random draw
    for iteration in callback.track(planned, "Phase 1", config.max_iterations, done=1):
        began = time.perf_counter()
        mean_loss, rate, is_finite = train_iteration(
            block, optimizer, contexts, embeddings, tokens, config, generator, objective
        )
        if not is_finite:
            raise _diverged(block, iteration, mean_loss, config)
        seconds = time.perf_counter() - began
        total += seconds
        metric = {"stage": "phase1", "iteration": iteration, "loss": mean_loss, "convergence_rate": rate}
        callback.after_round(None, metric | spread(contexts[1:]) | {"seconds": round(seconds, 4)})
        if reason := rule.update(rate):
            break
    return Phase1Result(iteration, rate, reason or "max_iterations", total), contexts


@torch.no_grad()
def spread(contexts: Tensor) -> dict[str, float]:
    """Describe a fixed sample of contexts `[n, context_dim]`, which are evenly spaced in the text.

    Returns:
        `dispersion`, the root of the mean squared distance of a context from the mean of all (OACD's first
        term is this, divided by the root of the batch size); `centroid`, the length of the mean; and
        `effective_rank`, the share of the dimensions that the contexts use, as in `scoring.effective_rank`.
    """
    sample = contexts[:: max(1, len(contexts) // SAMPLE)][:SAMPLE].cpu().float()  # the only wait for the GPU
    centroid = sample.mean(dim=0)
    dispersion = (sample - centroid).square().sum(dim=1).mean().sqrt()
    # The eigenvalues of the Gram matrix are the squares of the singular values, and faster to compute.
    shares = torch.linalg.eigvalsh((sample.T @ sample).double()).clamp(min=0).sqrt()
    shares = shares / shares.sum().clamp(min=1e-300)
    rank = (-torch.special.xlogy(shares, shares).sum()).exp() / len(shares)
    values = {"dispersion": dispersion, "centroid": centroid.norm(), "effective_rank": rank}
    return {name: value.item() for name, value in values.items()}


def train_iteration(
    block: nn.Module,
    optimizer: torch.optim.Optimizer,
    contexts: Tensor,
    embeddings: Tensor,
    tokens: Tensor,
    config: Phase1Config,
    generator: torch.Generator,
    objective: Objective,
) -> tuple[float, float, bool]:
    """Run one pass over the stream and take one optimizer step.

    The arguments are those of `train_context_block`. `contexts` are the padded contexts of the previous
    iteration, and are overwritten batch by batch.

    Returns:
        the mean loss of the batches, the share of positions that have converged, and whether the loss and all
        trained weights are finite.
    """
    optimizer.zero_grad()
    projected = project_inputs(block, embeddings)  # once per distinct token
    inputs = projected.detach().requires_grad_(projected.requires_grad)  # accumulates the batches' gradients
    batches, read = tokens.split(config.batch_size), 0
    total_loss, converged = torch.zeros(2, device=tokens.device)
    before = contexts[:1].clone()  # the old context just before the batch
    for batch, old in zip(batches, contexts[1:].split(config.batch_size), strict=True):  # views of contexts
        previous = torch.empty_like(old).normal_(std=config.noise_std, generator=generator)
        previous[:1].add_(before)
        previous[1:].add_(old[:-1])
        before = old[-1:].clone()
        new = block(previous, F.embedding(batch, inputs))
        batch_loss = objective.loss(new, previous, slice(read, read + len(batch))) / len(batches)
        read += len(batch)
        batch_loss.backward()
        change = F.mse_loss(new.detach(), old, reduction="none").mean(dim=1)
        converged += (change < config.convergence_threshold).sum()
        total_loss += batch_loss.detach()
        old.copy_(new.detach())
    if inputs.grad is not None:
        projected.backward(inputs.grad)
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    nn.utils.clip_grad_norm_(trained, config.clip_norm)
    optimizer.step()
    is_finite = torch.stack([weight.isfinite().all() for weight in trained]).all()
    # This is the only wait for the GPU in an iteration.
    mean_loss, count, finite = torch.stack([total_loss, converged, is_finite.to(total_loss)]).tolist()
    return mean_loss, count / len(tokens), bool(finite) and math.isfinite(mean_loss)


def _diverged(block: nn.Module, iteration: int, loss: float, config: Phase1Config) -> Diverged:
    cause = f"the loss is {loss}"
    if math.isfinite(loss):
        lost = [name for name, weight in block.named_parameters() if not weight.isfinite().all()]
        cause = f"{lost[0] if lost else 'a weight of the loss'} is not finite"
    return Diverged(
        f"Phase 1 diverged in iteration {iteration}: {cause}; lower phase1.learning_rate (here "
        f"{config.learning_rate:g}), or phase1.noise_std and phase1.initial_std if they were raised."
    )
