"""Phase 1: train the ContextBlock with OACD until the contexts stop moving.

OACD (Origin-Anchored Centroid Dispersion) spreads contexts around their centroid and holds the centroid
at the origin. Every iteration feeds each position the *previous iteration's* context of the position
before it, so all positions are computed at once.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ranks
from ..data.counts import principal_components
from ..errors import Diverged
from ..progress import Listener, Metric, progress_bar
from ..runs.checkpoint import Checkpoint, draws_name, gradients, optimizer_tensors, put_back, saved_draws
from ..runs.config import Phase1Config
from ..runs.placement import Pieces, give_back, parts
from .contexts import draw_contexts
from .model import ContextBlock


@dataclass(frozen=True)
class Phase1Result:
    """Outcome of Phase 1."""

    iterations: int
    convergence_rate: float | None
    stop_reason: str  # converged | plateau | max_iterations | untrained
    seconds: float


UNTRAINED = Phase1Result(0, None, "untrained", 0.0)  # of a baseline that has nothing for Phase 1


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


def begin(block: ContextBlock, embed_distinct: Tensor, tokens: Tensor, config: Phase1Config) -> None:
    """Bring weights as the constructor drew them to those that Phase 1 begins with."""
    if config.longest_mean:
        block.hold_means(*principal_components(embed_distinct, tokens), config.longest_mean)
    elif config.last_tokens:
        mean, _, deviations = principal_components(embed_distinct, tokens)
        block.hold_tokens(mean, deviations, config.last_tokens)
    else:
        block.scale_weights(config.weight_std)


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
    checkpoint: Path | None = None,
    key: str = "",
) -> Phase1Result:
    """Train `block` in place, and leave the last iteration's contexts in `contexts`.

    Args:
        embed_distinct: normed embeddings of the distinct tokens, `[num_distinct, hidden_size]`.
        tokens: int64 `[n]`, the stream as rows of `embed_distinct`.
        contexts: float32 `[n + 1, context_dim]`, padded (see `windows`), on any device; overwritten.
        generator: on the block's device; draws the first contexts and the noise.
        listener: gets one metric an iteration, from iteration 2 on, restored ones included.
        checkpoint: where to save the state now and then (see `Checkpoint`); a training that was stopped goes
            on from there, to the same numbers. None saves nothing.
        key: stands for all that the result depends on.

    Raises:
        Diverged: loss or weights are no longer finite.
    """
    began = time.perf_counter()
    optimizer = torch.optim.Adam(block.parameters(), lr=config.learning_rate)
    saved = Checkpoint(checkpoint, key) if checkpoint else None
    metrics, earlier = _restored(saved, block, optimizer, contexts, generator)
    if not metrics:
        begin(block, embed_distinct, tokens, config)
        draw_contexts(contexts, config.initial_std, generator, give_back)
    rule, rate, reason, pieces = StoppingRule(config), 0.0, None, Pieces("Phase 1")
    for metric in metrics:
        rate = metric["convergence_rate"]
        rule.reason(rate)
        listener(metric)
    iteration = 1 + len(metrics)
    with progress_bar(range(iteration + 1, config.max_iterations + 1), "Phase 1") as bar:
        for iteration in bar:
            tick = time.perf_counter()
            loss, rate = train_iteration(
                block, optimizer, embed_distinct, tokens, contexts, config, generator, pieces
            )
            _check_finite(block, iteration, loss, config)
            bar.set_postfix(loss=f"{loss:.3f}", converged=f"{rate:.0%}")
            metrics.append(_metric(iteration, loss, rate, time.perf_counter() - tick))
            reason = rule.reason(rate)
            if saved and saved.due and not reason:
                _gather(contexts, config)
                seconds = earlier + time.perf_counter() - began
                _save(saved, block, optimizer, contexts, generator, metrics, seconds)
            listener(metrics[-1])
            if reason:
                break
    _gather(contexts, config)
    seconds = earlier + time.perf_counter() - began
    return Phase1Result(iteration, rate, reason or "max_iterations", seconds)


def _save(
    checkpoint: Checkpoint,
    block: ContextBlock,
    optimizer: torch.optim.Optimizer,
    contexts: Tensor,
    generator: torch.Generator,
    metrics: list[Metric],
    seconds: float,
) -> None:
    tensors = optimizer_tensors(dict(block.named_parameters()), optimizer)
    tensors |= {"contexts": contexts, draws_name(generator.device): generator.get_state()}
    checkpoint.save(tensors, {"metrics": metrics, "seconds": seconds})


def _restored(
    checkpoint: Checkpoint | None,
    block: ContextBlock,
    optimizer: torch.optim.Optimizer,
    contexts: Tensor,
    generator: torch.Generator,
) -> tuple[list[Metric], float]:
    """Metrics so far and seconds they took, with everything else put in place; nothing if none was saved."""
    found = checkpoint.restore() if checkpoint else None
    if found is None:
        return [], 0.0
    tensors, state = found
    put_back(tensors, dict(block.named_parameters()), optimizer)
    for part, kept in zip(parts(contexts), parts(tensors["contexts"]), strict=True):
        part.copy_(kept)
    if (draws := saved_draws(tensors, generator.device)) is not None:
        generator.set_state(draws)
    return state["metrics"], state["seconds"]


def _check_finite(block: ContextBlock, iteration: int, loss: float, config: Phase1Config) -> None:
    lost = [name for name, weight in block.named_parameters() if not weight.isfinite().all()]
    if lost or not math.isfinite(loss):
        cause = f"the loss is {loss}" if not math.isfinite(loss) else f"{lost[0]} is not finite"
        raise Diverged(
            f"Phase 1 diverged in iteration {iteration}: {cause}; lower phase1.learning_rate (here "
            f"{config.learning_rate:g}), or phase1.noise_std and phase1.initial_std if they were raised, and "
            "use a new run folder."
        )


def _metric(iteration: int, loss: float, rate: float, seconds: float) -> Metric:
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
    pieces: Pieces | None = None,
) -> tuple[float, float]:
    """One pass over the stream and one optimiser step; overwrites `contexts`, returns loss and rate.

    Of several processes each takes some batches in a row, overwrites their contexts, and the one before them
    that it reads next time. All go through all draws, so that a batch has the same noise whoever takes it.
    """
    pieces = pieces or Pieces("Phase 1")
    batches = tokens.split(config.batch_size)
    ours = ranks.share(len(batches))
    token_half = block.project_tokens(embed_distinct)
    leaf = token_half.detach().requires_grad_()  # its gradient is gathered over batches, then passed on once
    total_loss = torch.zeros((), device=leaf.device)
    converged = torch.zeros((), dtype=torch.int64, device=leaf.device)
    edges = [min(number * config.batch_size, len(tokens)) for number in (ours.start, ours.stop)]
    before = contexts[edges[0]].to(leaf)  # the previous iteration's, of the position before the batch
    start = 0
    optimizer.zero_grad()
    for number, batch in enumerate(batches):
        rows = slice(start + 1, start + 1 + len(batch))
        start += len(batch)
        previous = leaf.new_empty(len(batch), leaf.shape[1])
        if not ours.start <= number < ours.stop:
            ranks.skip_normal(previous, generator)
            continue
        previous.normal_(std=config.noise_std, generator=generator)
        held = contexts[rows].to(leaf)
        previous[0].add_(before)
        previous[1:].add_(held[:-1])
        before = held[-1].clone()
        fresh, loss = _add_gradients(
            block, leaf, previous, batch, config.centroid_weight, 1 / len(batches), pieces
        )
        moved = F.mse_loss(fresh, held, reduction="none").mean(dim=1)
        contexts[rows] = fresh
        total_loss += loss
        converged += (moved < config.convergence_threshold).sum()
        give_back(contexts)
    if leaf.grad is not None:  # else no batch is left for this process
        token_half.backward(leaf.grad)
    if ranks.count() > 1:
        _add_up(block, (total_loss, converged), contexts, *edges)
    torch.nn.utils.clip_grad_norm_(block.parameters(), config.clip_norm)
    optimizer.step()
    return total_loss.item(), converged.item() / len(tokens)


def _add_up(block: ContextBlock, counts: Sequence[Tensor], contexts: Tensor, before: int, last: int) -> None:
    """Make gradients and counts those of all processes, and hand on the last context of each to the next.

    Args:
        before: row before this process's own ones; overwritten.
        last: row of its own last one.
    """
    edges = counts[0].new_zeros(ranks.count(), contexts.shape[1])
    edges[ranks.index()] = contexts[last]
    ranks.sum_([edges, *gradients(block.parameters())])
    exact = torch.stack([count.double() for count in counts])
    ranks.sum_([exact])
    for count, total in zip(counts, exact, strict=True):
        count.copy_(total)
    if ranks.index():
        contexts[before] = edges[ranks.index() - 1]


def _gather(contexts: Tensor, config: Phase1Config) -> None:
    """Give every process the contexts of all."""
    size = config.batch_size
    shares = ranks.shares(-(-(len(contexts) - 1) // size))
    ranks.share_([contexts[1:][share.start * size : share.stop * size] for share in shares])


def _add_gradients(
    block: ContextBlock,
    leaf: Tensor,
    previous: Tensor,
    batch: Tensor,
    centroid_weight: float,
    scale: float,
    pieces: Pieces,
) -> tuple[Tensor, Tensor]:
    """Contexts of a batch, `[n, context_dim]`, and its loss; its gradients are added to what is there."""
    reached = (block.linear.weight, *block.norm.parameters(), leaf)  # the bias is in `leaf`
    while True:
        try:
            fresh, loss, gradients = _gradients(
                block, reached, previous, batch, centroid_weight, scale, pieces
            )
            break
        except (RuntimeError, MemoryError) as error:
            pieces.double(error, len(batch))
    for tensor, gradient in zip(reached, gradients, strict=True):
        tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
    return fresh, loss


def _gradients(
    block: ContextBlock,
    reached: tuple[Tensor, ...],
    previous: Tensor,
    batch: Tensor,
    centroid_weight: float,
    scale: float,
    pieces: Pieces,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Contexts and loss of a batch, and the gradients of `reached`, whose last one is the token half.

    The loss is that of the whole batch. In pieces, its gradient is known only after a first reading without
    autograd; a second one takes it back piece by piece.
    """
    leaf = reached[-1]
    if pieces.count == 1:
        updated = block(previous, F.embedding(batch, leaf))
        fresh = updated.detach()
        loss, gradient = oacd_loss(fresh, centroid_weight, scale)
        return fresh, loss, torch.autograd.grad(updated, reached, gradient)
    size = -(-len(batch) // pieces.count)
    parts = list(zip(previous.split(size), batch.split(size), strict=True))
    with torch.no_grad():
        fresh = torch.cat([block(before, F.embedding(rows, leaf)) for before, rows in parts])
    loss, gradient = oacd_loss(fresh, centroid_weight, scale)
    sums = [torch.zeros_like(tensor) for tensor in reached]
    for (before, rows), direction in zip(parts, gradient.split(size), strict=True):
        found = torch.autograd.grad(block(before, F.embedding(rows, leaf)), reached, direction)
        for total, part in zip(sums, found, strict=True):
            total.add_(part)
    return fresh, loss, sums
