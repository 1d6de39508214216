"""Estimate how long training takes on this machine by timing a few batches of each phase."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import friendly_errors
from ..method.caches import DTYPES, Cache
from ..method.config import GPT2_VOCAB_SIZE
from ..method.loop import Loop, Metric
from ..method.model import ContextKV
from ..method.oacd import train_context_block
from ..method.phase2 import STEPPERS, epoch_order, train_step
from ..method.scoring import EVALUATION_ROWS, token_scores
from ..runs.build import untrained_model
from ..runs.config import ExperimentConfig
from ..runs.device import choose_device, choose_precision, torch_state
from ..runs.presets import usual_epochs

TIMED_BATCHES = 2  # number of batches to time, after one warm-up batch
# A text with n tokens has about 22 * sqrt(n) distinct tokens. For example, 6,324 tokens have 1,581.
DISTINCT_TOKENS = 22
# Standard deviation of the random token table. With 1, `exp` of the logits would overflow and be
# computed more slowly.
TABLE_STD = 0.02


@friendly_errors()
def measure_times(config: ExperimentConfig, train_tokens: int, val_tokens: int) -> dict[str, Any]:
    """Measure how long training takes. The model is untrained, and tokens and contexts are random.

    Returns:
        a dictionary with `tokens` (length of the training stream), `iteration_seconds` (time per Phase 1
        iteration, or None if Phase 1 trains nothing), `iterations` (maximum number of iterations),
        `epoch_seconds` (time per epoch, including validation), `epochs` (minimum and maximum number of
        epochs), and `usual_epochs` (range that is usual in practice, or None if it is unknown).
    """
    device = choose_device(config.runtime.device)
    precision = choose_precision(config.runtime.precision, device)
    with torch_state(config.runtime.threads):
        model = untrained_model(config, GPT2_VOCAB_SIZE, config.data.unigram == "corpus").to(device)
        model.wte.weight.data.mul_(TABLE_STD)
        trains_block = config.reads == "contexts"
        iteration = _iteration_seconds(model, config, train_tokens) if trains_block else None
        epoch = _epoch_seconds(model, config, precision, train_tokens, val_tokens)
    return {
        "tokens": train_tokens,
        "iteration_seconds": iteration,
        "iterations": max(0, config.phase1.max_iterations - 1),  # the first iteration trains nothing
        "epoch_seconds": epoch,
        "epochs": [config.phase2.least_epochs, config.phase2.max_epochs],
        "usual_epochs": usual_epochs(config),
    }


class _Stopwatch(Loop):
    seconds: float | None = None  # duration of the last iteration of Phase 1

    def after_round(self, state: Any, metric: Metric) -> None:
        self.seconds = metric["seconds"]


def _iteration_seconds(model: ContextKV, config: ExperimentConfig, positions: int) -> float | None:
    """Estimate the seconds per Phase 1 iteration from a few batches, with proportionally fewer tokens."""
    phase1, loss, stopwatch = config.phase1, config.plugins.get("loss"), _Stopwatch()
    if phase1.context_method == "exact":
        positions = min(positions, phase1.max_tokens)
    share = min(1.0, TIMED_BATCHES * phase1.batch_size / positions)
    distinct = min(GPT2_VOCAB_SIZE, 1 + int(share * DISTINCT_TOKENS * positions**0.5))
    few = replace(phase1, max_iterations=min(3, phase1.max_iterations), convergence_threshold=0.0)
    model.set_phase(1)
    model.train()
    embeddings = model.embed(torch.arange(distinct, device=model.device))
    tokens = torch.randint(distinct, (round(share * positions),), device=model.device)
    train_context_block(
        model.context_block,
        embeddings,
        tokens,
        few,
        torch.Generator(model.device).manual_seed(config.runtime.seed),
        loss.objective(model) if loss else None,
        stopwatch,
        (embeddings, tokens),
    )
    return stopwatch.seconds and stopwatch.seconds / share


def _epoch_seconds(
    model: ContextKV, config: ExperimentConfig, precision: str, positions: int, val_positions: int
) -> float:
    """Estimate the seconds per epoch by timing a few training steps and the scoring of a few random rows."""
    size = min(positions, config.phase2.batch_size)
    count = 2 * (1 + TIMED_BATCHES) * max(size, EVALUATION_ROWS)
    ids = torch.randint(GPT2_VOCAB_SIZE, (count + 1,), device=model.device).int()
    train = validation = Cache(ids)
    if config.reads == "contexts":
        contexts = torch.randn(count + 1, config.model.context_dim, device=model.device)
        train, validation = (Cache(ids, contexts.to(DTYPES[name])) for name in (precision, "fp32"))
    model.init_layer(ids, config.phase1)
    model.set_phase(2)
    model.train()
    stepper = STEPPERS[config.phase2.optimizer](model.trained_weights(), config.phase2, count)
    table = model.wte.weight.detach().to(DTYPES[precision])
    batches = model.batches(train, epoch_order(count, config.runtime.seed, 1, model.window.chunk), size)
    step = _mean_seconds(lambda: train_step(model, table, stepper, Loop(), next(batches), size, precision))
    rows = torch.arange(count)[-EVALUATION_ROWS:]
    scoring = _mean_seconds(lambda: token_scores(model, validation, rows)[0].sum())
    return step * positions / size + scoring * val_positions / EVALUATION_ROWS


def _mean_seconds(act: Callable[[], Tensor]) -> float:
    """Return the mean seconds per call of `act`, including the wait for the scalar that `act` returns."""
    act().item()
    began = time.perf_counter()
    for _ in range(TIMED_BATCHES):
        act().item()
    return (time.perf_counter() - began) / TIMED_BATCHES
