"""Phase 1: train the ContextBlock with OACD until its contexts converge.

OACD (Origin-Anchored Centroid Dispersion) spreads contexts around their centroid and anchors the centroid at
the origin. Every iteration gives each position the *previous iteration's* context of the position before it,
so all positions are computed at once.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Phase1Config
from .contexts import draw_contexts
from .loop import Diverged, Loop, Metric
from .model import project_inputs

GROUP_ROWS = 2**16  # positions of the batches that any device but a CPU computes together
# The loss of a batch's contexts `[n, context_dim]`: a scalar, differentiated by autograd.
ContextLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Phase1Result:
    """Outcome of Phase 1."""

    iterations: int
    convergence_rate: float | None
    stop_reason: str  # converged | plateau | max_iterations | untrained
    seconds: float


UNTRAINED = Phase1Result(0, None, "untrained", 0.0)


@dataclass
class Phase1State:
    """What a Phase 1 under way needs to go on."""

    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    contexts: Tensor
    generator: torch.Generator
    metrics: list[Metric] = field(default_factory=list)
    seconds: float = 0.0
    buffers: dict[str, Tensor] = field(default_factory=dict)


def oacd_loss(contexts: Tensor, centroid_weight: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute `-||X - mean(X)||_F / n + centroid_weight * ||mean(X)||^2` of X `[n, context_dim]`.

    The gradient is written out, `-(X - mean(X)) / (n ||X - mean(X)||_F) + 2 centroid_weight mean(X) / n`: one
    pass instead of autograd's six.

    Args:
        contexts: X, or batches of it, `[batches, n, context_dim]`, whose losses are summed.

    Returns:
        loss and gradient, both multiplied by `scale`.
    """
    per_row = scale / contexts.shape[-2]
    centroid = contexts.mean(dim=-2, keepdim=True)
    centred = contexts - centroid
    spread = torch.linalg.vector_norm(centred, dim=(-2, -1), keepdim=True)
    losses = scale * centroid_weight * centroid.square().sum(dim=-1, keepdim=True) - per_row * spread
    spread = spread.clamp(min=torch.finfo(spread.dtype).tiny)  # a single row is its own centroid
    if centred.requires_grad:  # in a loss of the user's, where autograd needs it as it is
        centred = centred.clone()
    gradient = centred.mul_(-per_row / spread).add_(centroid, alpha=2 * centroid_weight * per_row)
    return losses.sum(), gradient


class StoppingRule:
    """Stop at `stop_rate`, or when the rate, above `plateau_rate`, gains too little several times running."""

    def __init__(self, config: Phase1Config) -> None:
        self.config = config
        self.last_rate = -math.inf
        self.stalled = 0

    def reason(self, rate: float) -> str | None:
        """Return why to stop after an iteration with this convergence rate; None goes on."""
        stalled = rate > self.config.plateau_rate and rate - self.last_rate < self.config.plateau_gain
        self.stalled = self.stalled + 1 if stalled else 0
        self.last_rate = rate
        if rate >= self.config.stop_rate:
            return "converged"
        return "plateau" if self.stalled >= self.config.plateau_patience else None


def train_context_block(
    block: nn.Module,
    embeddings: Tensor,
    tokens: Tensor,
    config: Phase1Config,
    contexts: Tensor,
    generator: torch.Generator,
    loss: ContextLoss | None = None,
    loop: Loop | None = None,
) -> Phase1Result:
    """Train `block` in place, and leave the last iteration's contexts in `contexts`.

    Args:
        embeddings: normed embeddings of the distinct tokens, `[num_distinct, hidden_size]`.
        tokens: int64 `[n]`, the stream as rows of `embeddings`.
        contexts: float32 `[n + 1, context_dim]`, padded (see `windows`), on any device; overwritten.
        generator: on the block's device; draws the first contexts and the noise.
        loss: of a batch's contexts, in the place of OACD.

    Raises:
        Diverged: loss or weights are no longer finite.
    """
    loop, weights = loop or Loop(), dict(block.named_parameters())
    init: Callable[..., None] = getattr(block, "init_weights", lambda *_: None)
    if not weights or not config.max_iterations:
        init(embeddings, tokens, config)
        return UNTRAINED
    optimizer = torch.optim.Adam(weights.values(), lr=config.learning_rate)
    buffers = dict(block.named_buffers())  # which `init_weights` may fill
    state = Phase1State(weights, optimizer, contexts, generator, buffers=buffers)
    loop.restore(state)
    if not state.metrics:
        init(embeddings, tokens, config)
        draw_contexts(contexts, config.initial_std, generator, loop.release)
    rule, iteration, rate, reason = StoppingRule(config), 1, 0.0, None
    for metric in state.metrics:
        iteration, rate = metric["iteration"], metric["convergence_rate"]
        reason = rule.reason(rate)
    most = 0 if reason else config.max_iterations
    for iteration in loop.track(range(iteration + 1, most + 1), "Phase 1", most, iteration):  # noqa: B020
        began = time.perf_counter()
        mean_loss, rate = train_iteration(block, state, embeddings, tokens, config, loss, loop)
        _check_finite(block, iteration, mean_loss, config)
        seconds = time.perf_counter() - began
        state.seconds += seconds
        metric = {
            "stage": "phase1",
            "iteration": iteration,
            "loss": mean_loss,
            "convergence_rate": rate,
            "seconds": round(seconds, 4),
        }
        state.metrics.append(metric)
        loop.after_round(state, metric)
        if reason := rule.reason(rate):
            break
    return Phase1Result(iteration, rate, reason or "max_iterations", state.seconds)


def train_iteration(
    block: nn.Module,
    state: Phase1State,
    embeddings: Tensor,
    tokens: Tensor,
    config: Phase1Config,
    loss: ContextLoss | None = None,
    loop: Loop | None = None,
) -> tuple[float, float]:
    """Do one pass over the stream and one optimiser step; arguments as of `train_context_block`.

    Returns:
        mean loss of the batches, and the share of positions that have converged.
    """
    loop, contexts = loop or Loop(), state.contexts
    scale = 1 / -(-len(tokens) // config.batch_size)  # the mean over all batches
    projected = project_inputs(block, embeddings)
    inputs = projected.detach().requires_grad_(projected.requires_grad)  # gathers the gradient of all batches
    trained = [*block.parameters(), *([inputs] if inputs.requires_grad else [])]

    def read(before: Tensor, batch: Tensor) -> Tensor:
        contexts: Tensor = block(before, F.embedding(batch, inputs))
        return contexts

    total_loss = torch.zeros((), device=embeddings.device)
    converged = torch.zeros((), dtype=torch.int64, device=embeddings.device)
    before = contexts[0].to(embeddings)  # the previous iteration's, of the position before the batch
    state.optimizer.zero_grad()
    groups = _groups(tokens, config.batch_size)
    for batch, rows in zip(groups, contexts[1:].split([*map(len, groups)]), strict=True):
        held = rows.to(embeddings)  # the previous iteration's
        previous = torch.empty_like(held).normal_(std=config.noise_std, generator=state.generator)
        previous[0].add_(before)
        previous[1:].add_(held[:-1])
        before = held[-1].clone()

        def gradients(
            previous: Tensor = previous, batch: Tensor = batch
        ) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
            updated = loop.apply(read, previous, batch)
            batch_loss, gradient = _loss_and_gradient(updated, loss, config, scale)
            found = torch.autograd.grad(updated, trained, gradient, allow_unused=True)
            return updated.detach(), batch_loss, found

        updated, batch_loss, found = loop.attempt(gradients, len(batch))
        for tensor, gradient in zip(trained, found, strict=True):
            if gradient is not None:
                tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
        moved = F.mse_loss(updated, held, reduction="none").mean(dim=1)
        rows.copy_(updated)
        total_loss += batch_loss
        converged += (moved < config.convergence_threshold).sum()
        loop.release(contexts)
    if inputs.grad is not None:
        projected.backward(inputs.grad)
    torch.nn.utils.clip_grad_norm_(block.parameters(), config.clip_norm)
    state.optimizer.step()
    mean_loss, count = torch.stack([total_loss.double(), converged.double()]).tolist()
    return mean_loss, count / len(tokens)


def _groups(tokens: Tensor, size: int) -> Sequence[Tensor]:
    """Cut a stream into batches of `size`, on a CPU one at a time, elsewhere many full ones together.

    A GPU would spend more time on starting the small work of a batch than on doing it. Each batch still has
    a loss of its own.
    """
    together = 1 if tokens.device.type == "cpu" else max(1, GROUP_ROWS // size)
    full = len(tokens) // size * size
    return [part for part in (*tokens[:full].split(size * together), tokens[full:]) if len(part)]


def _loss_and_gradient(
    contexts: Tensor, loss: ContextLoss | None, config: Phase1Config, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the summed loss of a group's batches and its gradient, both multiplied by `scale`."""
    if loss is None:
        batches = contexts.detach().unflatten(0, (-1, min(config.batch_size, len(contexts))))
        value, gradient = oacd_loss(batches, config.centroid_weight, scale)
        return value, gradient.flatten(0, 1)
    value = torch.stack([loss(batch) * scale for batch in contexts.split(config.batch_size)]).sum()
    return value.detach(), torch.autograd.grad(value, contexts)[0]


def _check_finite(block: nn.Module, iteration: int, loss: float, config: Phase1Config) -> None:
    names, weights = zip(*block.named_parameters(), strict=True)
    finite = torch.stack([weight.isfinite().all() for weight in weights]).tolist()  # waits once for a GPU
    if (is_lost := not math.isfinite(loss)) or not all(finite):
        cause = f"the loss is {loss}" if is_lost else f"{names[finite.index(False)]} is not finite"
        raise Diverged(
            f"Phase 1 diverged in iteration {iteration}: {cause}; lower phase1.learning_rate (here "
            f"{config.learning_rate:g}), or phase1.noise_std and phase1.initial_std if they were raised."
        )
