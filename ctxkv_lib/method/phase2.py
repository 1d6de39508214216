"""Phase 2: next-token training of attention and feed-forward over the cached contexts."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..errors import Diverged
from ..hf.modeling import NOT_DRAWN, ContextKVForCausalLM, Dropout
from ..progress import Listener, Metric, progress_bar
from ..runs.checkpoint import (
    Checkpoint,
    draws_name,
    dropout_draws,
    gradients,
    optimizer_tensors,
    put_back,
    saved_draws,
    set_dropout_draws,
)
from ..runs.config import Phase2Config
from ..runs.placement import Pieces
from .caches import Batch, StreamCache, TrainingStream, epoch_seed
from .evaluation import evaluate, perplexity
from .memory import snapshot
from .optimizer import Average, make_optimizer, rate_factor

CHECKED_STEPS = 50  # steps between two looks at the loss, each of which waits for a GPU


class EarlyStopping:
    """Keeps the best epoch; stops after `patience` epochs in a row that are not strictly better."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = math.inf
        self.no_improve = 0

    def improved(self, val_ppl: float) -> bool:
        """Take an epoch's validation PPL; True if it is the lowest so far."""
        better = val_ppl < self.best
        self.best = min(self.best, val_ppl)
        self.no_improve = 0 if better else self.no_improve + 1
        return better

    @property
    def should_stop(self) -> bool:
        return self.no_improve >= self.patience


@dataclass(frozen=True)
class Phase2Result:
    epochs: list[Metric]
    stop_reason: str  # early_stopping | max_epochs


def train_attention(
    model: ContextKVForCausalLM,
    train: TrainingStream,
    validation: StreamCache,
    config: Phase2Config,
    seed: int,
    checkpoint: Path,
    key: str,
    listener: Listener,
) -> Phase2Result:
    """Train `model` in place and leave it with the best epoch's weights.

    Each epoch's order and dropout are drawn from (seed, epoch) alone, so a training resumed from
    `checkpoint` gives the same numbers as one that never stopped.

    Args:
        train: its dtype, float32 or bfloat16, is that of the matrix products of training (see `train_step`);
            sums, optimiser and validation are float32.
        checkpoint: written after every epoch and now and then within (see `Checkpoint`); taken up again only
            if it was written for the same `key`.
        listener: gets one metric an epoch, restored epochs included.

    Raises:
        Diverged: the loss is no longer finite.
    """
    training = _Training(model, train, validation, config, seed, Checkpoint(checkpoint, key))
    training.restore()
    stopping = EarlyStopping(config.patience)
    for metric in training.epochs:
        stopping.improved(metric["val_ppl"])
        listener(metric)
    while not stopping.should_stop and len(training.epochs) < config.max_epochs:
        training.epoch(stopping)
        listener(training.epochs[-1])
    for name, parameter in training.weights.items():
        parameter.data.copy_(training.best[name])
    model.eval()
    return Phase2Result(training.epochs, "early_stopping" if stopping.should_stop else "max_epochs")


class _Training:
    """A Phase 2 under way: what it works on, and how far it is.

    Attributes:
        epochs: metrics of the finished epochs.
        best: weights of the best of them.
        average: of the weights, if they are averaged; it is what is validated and kept.
        position: of the epoch under way, how many positions of its order are done.
        total: their summed loss, on the device.
        seconds: what they took in earlier processes.
        draws: the generator's state after them, where an earlier process did them.
    """

    def __init__(
        self,
        model: ContextKVForCausalLM,
        train: TrainingStream,
        validation: StreamCache,
        config: Phase2Config,
        seed: int,
        checkpoint: Checkpoint,
    ) -> None:
        model.set_phase(2)
        self.model, self.train, self.validation = model, train, validation
        self.config, self.seed, self.checkpoint = config, seed, checkpoint
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(model, config, len(train))
        self.average = Average(self.weights, config.averaging) if config.averaging else None
        self.table = model.wte.weight.detach().to(train.dtype)
        self.pieces, self.validation_pieces = Pieces("Phase 2"), Pieces("validation")
        self.epochs: list[Metric] = []
        self.best: dict[str, Tensor] = {}
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.position, self.seconds = 0, 0.0
        self.total = torch.zeros((), device=self.model.device)
        self.draws: Tensor | None = None

    def epoch(self, stopping: EarlyStopping) -> None:
        """Do the next epoch, or what is left of it."""
        began = time.perf_counter() - self.seconds
        number = len(self.epochs) + 1
        self._train(number, began)
        train_loss = self.total.item() / len(self.train)
        with self.average.in_place() if self.average else nullcontext():
            score = evaluate(self.model, self.validation, self.validation_pieces)
        if not (math.isfinite(perplexity(train_loss)) and math.isfinite(score.perplexity)):
            raise self._diverged(number, f"train loss {train_loss}, validation loss {score.loss}")
        improved = stopping.improved(score.perplexity)
        metric = {
            "stage": "phase2",
            "epoch": number,
            "train_ppl": perplexity(train_loss),
            "val_ppl": score.perplexity,
            "val_acc": score.accuracy,
            "improved": improved,
            "no_improve": stopping.no_improve,
            "seconds": round(time.perf_counter() - began, 3),
            "memory": snapshot(f"epoch {number}", self.model.device),
        }
        self.epochs.append(metric)
        if improved:
            kept = self.average.values if self.average else self.weights
            self.best = {name: weight.detach().clone() for name, weight in kept.items()}
        self._begin_epoch()
        self.save()

    def _train(self, number: int, began: float) -> None:
        """Every step of an epoch that is not done yet."""
        self.model.train()
        torch.manual_seed(epoch_seed(self.seed, number))  # dropout
        if self.draws is not None:
            set_dropout_draws(self.model.device, self.draws)
        done, steps = (-(-count // self.config.batch_size) for count in (self.position, len(self.train)))
        name = f"Phase 2, epoch {number} of at most {self.config.max_epochs}"
        bar = progress_bar(self._steps(number), name, total=steps, initial=done)
        for step, _ in enumerate(bar, start=done + 1):
            looked_at = step % CHECKED_STEPS == 0
            due = (looked_at or ranks.count() == 1) and self.checkpoint.due
            if (due or looked_at) and not self.total.isfinite():
                raise self._diverged(number, f"by step {step} of {steps} the loss is {self.total.item()}")
            if due:
                self.seconds = time.perf_counter() - began
                self.save()

    def _steps(self, number: int) -> Iterator[None]:
        """One optimiser step after another; after each one, all of this object's state is in order."""
        size, device = self.config.batch_size, self.model.device
        batches: Iterator[Batch] | None = None
        while self.position < len(self.train):
            count = min(size, len(self.train) - self.position)
            if batches is None:
                batches = self.train.epoch(
                    self.seed, number, self.position, size, self.model, self.pieces.count
                )
            draws = dropout_draws(device)
            try:
                loss = self._gradients(batches, count)
            except (RuntimeError, MemoryError) as error:
                self.pieces.double(error, count)
                set_dropout_draws(device, draws)
                batches = None
                continue
            self._add_up(loss)
            self._step(count)
            self.total += loss
            yield

    def _step(self, count: int) -> None:
        """Take the gradients of `count` positions."""
        size = self.config.batch_size
        an_epoch = -(-len(self.train) // size)
        step = len(self.epochs) * an_epoch + self.position // size
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate_factor(
                step, self.config.max_epochs * an_epoch, self.config
            )
        self.optimizer.step()
        self.position += count
        if self.average:
            self.average.take_in(step + 1)

    def _gradients(self, batches: Iterator[Batch], count: int) -> Tensor:
        """Gradients of this process's part of the next `count` positions; returns their summed loss."""
        self.optimizer.zero_grad()
        drawn = NOT_DRAWN  # in parts, dropout is that of the whole batch
        if self.pieces.count > 1 or ranks.count() > 1:
            drawn = self.model.drawn_dropout(count)
        total, share = torch.zeros_like(self.total), ranks.share(count)
        done = share.start
        while done < share.stop:
            batch = next(batches)
            rows = slice(done, done + len(batch.targets))
            total += add_gradients(self.model, self.table, batch, count, drawn.rows(rows))
            done = rows.stop
        return total

    def _add_up(self, loss: Tensor) -> None:
        """Make gradients and loss of this process's part those of the batch, everywhere.

        What each process sends is the size of the gradients, 25 MB at the published size.
        """
        ranks.sum_([loss, *gradients(self.weights.values())])

    def _diverged(self, number: int, cause: str) -> Diverged:
        return Diverged(
            f"Phase 2 diverged in epoch {number} ({cause}); lower phase2.learning_rate (here "
            f"{self.config.learning_rate:g}) and use a new run folder."
        )

    def save(self) -> None:
        device = self.model.device
        tensors = optimizer_tensors(self.weights, self.optimizer) | {"total": self.total}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        if self.average:
            tensors |= {f"average/{name}": value for name, value in self.average.values.items()}
        tensors |= {draws_name(device): dropout_draws(device)}
        state = {"epochs": self.epochs, "position": self.position, "seconds": self.seconds}
        self.checkpoint.save(tensors, state)

    def restore(self) -> None:
        """Take up what was saved, if anything was."""
        found = self.checkpoint.restore()
        if found is None:
            return
        tensors, state = found
        put_back(tensors, self.weights, self.optimizer)
        if self.average:
            for name, value in self.average.values.items():
                value.copy_(tensors[f"average/{name}"])
        self.epochs, self.position, self.seconds = state["epochs"], state["position"], state["seconds"]
        if self.epochs:
            best = {name: tensors[f"best/{name}"] for name in self.weights}
            self.best = {name: value.to(self.model.device, copy=True) for name, value in best.items()}
        if self.position:
            self.total.copy_(tensors["total"])
            self.draws = saved_draws(tensors, self.model.device)


def train_step(
    model: ContextKVForCausalLM, optimizer: torch.optim.AdamW, table: Tensor, batch: Batch
) -> Tensor:
    """One optimiser step on a batch's mean loss; returns its summed loss, on the device.

    Args:
        table: the model's token table in the dtype of the matrix products.
    """
    optimizer.zero_grad()
    loss = add_gradients(model, table, batch, len(batch.targets))
    optimizer.step()
    return loss


def add_gradients(
    model: ContextKVForCausalLM, table: Tensor, batch: Batch, count: int, dropout: Dropout = NOT_DRAWN
) -> Tensor:
    """Add the gradients of a batch's mean loss, or a piece's part of them; returns the summed loss.

    A bf16 table makes the products of the output head bf16, four fifths of all, and on a GPU the layer's as
    well. On a CPU these would save another eighth of the time, but double the gradient's error.

    Args:
        table: as in `train_step`.
        count: positions of the whole batch.
        dropout: as in `model.attend`.
    """
    with torch.autocast("cuda", torch.bfloat16, enabled=table.is_cuda and table.dtype == torch.bfloat16):
        hidden, _ = batch.attend(model, dropout)
    losses, _ = model.losses(hidden, batch.tokens, batch.targets, table)
    (losses.sum() / count).backward()
    return losses.detach().sum()


def best_epoch(epochs: list[Metric]) -> dict[str, Any]:
    """The epoch whose weights were kept: the last one that improved."""
    return next(metric for metric in reversed(epochs) if metric["improved"])
