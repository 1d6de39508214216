"""Phase 2: next-token training of attention and feed-forward over the cached contexts."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Phase2Config
from ..errors import UserError
from ..files import read_tensors, tensor_metadata, write_tensors
from ..memory import snapshot
from ..model.modeling import ContextKVForCausalLM
from ..progress import Listener, Metric, progress_bar
from .caches import Batch, StreamCache
from .evaluation import evaluate, perplexity
from .losses import frozen_head_cross_entropy


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


@dataclass
class Progress:
    """Everything a stopped training needs to go on as if it had not stopped."""

    epochs: list[Metric] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path, key: str, weights: Mapping[str, Tensor], optimizer: torch.optim.AdamW) -> None:
        tensors = {f"weight/{name}": value for name, value in weights.items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for name, parameter in weights.items():
            state = optimizer.state.get(parameter, {})
            tensors |= {f"adam/{name}/{slot}": value for slot, value in state.items()}
        write_tensors(path, tensors, {"key": key, "epochs": json.dumps(self.epochs)})

    @classmethod
    def restore(
        cls, path: Path, key: str, weights: Mapping[str, Tensor], optimizer: torch.optim.AdamW
    ) -> "Progress":
        """The saved progress, with weights and optimiser state put in place; empty if none fits `key`."""
        metadata = tensor_metadata(path) if path.exists() else {}
        if metadata.get("key") != key:
            return cls()
        tensors = read_tensors(path)
        for name, parameter in weights.items():
            parameter.data.copy_(tensors[f"weight/{name}"])
            prefix = f"adam/{name}/"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                optimizer.state[parameter] = {
                    slot: value if slot == "step" and not optimizer.defaults["fused"] else value.to(parameter)
                    for slot, value in state.items()
                }
        best = {name: tensors[f"best/{name}"].to(parameter) for name, parameter in weights.items()}
        return cls(json.loads(metadata["epochs"]), best)


@dataclass(frozen=True)
class Phase2Result:
    epochs: list[Metric]
    stop_reason: str  # early_stopping | max_epochs


def train_attention(
    model: ContextKVForCausalLM,
    train: StreamCache,
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
        train: its contexts' dtype, float32 or bfloat16, is that of the matrix products of training (see
            `train_step`); sums, optimiser and validation are float32.
        checkpoint: written after every epoch; taken up again only if it was written for the same `key`.
        listener: gets one metric an epoch, restored epochs included.

    Raises:
        UserError: the loss is no longer finite.
    """
    model.set_phase(2)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(model, config)
    table = model.wte.weight.detach().to(train.contexts.dtype)
    progress = Progress.restore(checkpoint, key, weights, optimizer)
    stopping = EarlyStopping(config.patience)
    for metric in progress.epochs:
        stopping.improved(metric["val_ppl"])
        listener(metric)
    while not stopping.should_stop and len(progress.epochs) < config.max_epochs:
        metric = _epoch(
            model, optimizer, table, train, validation, config, seed, len(progress.epochs) + 1, stopping
        )
        progress.epochs.append(metric)
        if metric["improved"]:
            progress.best = {name: p.detach().clone() for name, p in weights.items()}
        progress.save(checkpoint, key, weights, optimizer)
        listener(metric)
    for name, parameter in weights.items():
        parameter.data.copy_(progress.best[name])
    model.eval()
    return Phase2Result(progress.epochs, "early_stopping" if stopping.should_stop else "max_epochs")


def make_optimizer(model: ContextKVForCausalLM, config: Phase2Config) -> torch.optim.AdamW:
    """AdamW over what Phase 2 trains, as one fused kernel where there is one."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=model.device.type != "mps",
    )


def _epoch(
    model: ContextKVForCausalLM,
    optimizer: torch.optim.AdamW,
    table: Tensor,
    train: StreamCache,
    validation: StreamCache,
    config: Phase2Config,
    seed: int,
    epoch: int,
    stopping: EarlyStopping,
) -> Metric:
    began = time.perf_counter()
    train_loss = _train_epoch(model, optimizer, table, train, config, seed, epoch)
    score = evaluate(model, validation)
    if not (math.isfinite(perplexity(train_loss)) and math.isfinite(score.perplexity)):
        raise UserError(
            f"Phase 2 diverged in epoch {epoch} (train loss {train_loss}, validation loss {score.loss}); "
            "lower phase2.learning_rate and use a new run folder."
        )
    improved = stopping.improved(score.perplexity)
    return {
        "stage": "phase2",
        "epoch": epoch,
        "train_ppl": perplexity(train_loss),
        "val_ppl": score.perplexity,
        "val_acc": score.accuracy,
        "improved": improved,
        "no_improve": stopping.no_improve,
        "seconds": round(time.perf_counter() - began, 3),
        "memory": snapshot(f"epoch {epoch}", model.device),
    }


def epoch_seed(seed: int, epoch: int) -> int:
    """What an epoch's order and dropout are drawn from."""
    return seed * 1_000_003 + epoch


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of all `count` positions in which an epoch visits them, int64 on the CPU."""
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    return torch.randperm(count, generator=generator)


def _train_epoch(
    model: ContextKVForCausalLM,
    optimizer: torch.optim.AdamW,
    table: Tensor,
    train: StreamCache,
    config: Phase2Config,
    seed: int,
    epoch: int,
) -> float:
    """Mean training loss of one epoch, in nats a token."""
    model.train()
    torch.manual_seed(epoch_seed(seed, epoch))  # dropout
    batches = train.batches(epoch_order(len(train), seed, epoch), config.batch_size, model)
    total = torch.zeros((), device=model.device)
    steps = -(-len(train) // config.batch_size)
    name = f"Phase 2, epoch {epoch} of at most {config.max_epochs}"
    for batch in progress_bar(batches, name, total=steps):
        total += train_step(model, optimizer, table, batch)
    return total.item() / len(train)


def train_step(
    model: ContextKVForCausalLM, optimizer: torch.optim.AdamW, table: Tensor, batch: Batch
) -> Tensor:
    """One optimiser step on a batch's mean loss; returns its summed loss, on the device.

    A bf16 table makes the products of the output head bf16, four fifths of all, and on a GPU the layer's as
    well. On a CPU these would save another eighth of the time, but double the gradient's error.

    Args:
        table: the model's token table in the dtype of the matrix products.
    """
    with torch.autocast("cuda", torch.bfloat16, enabled=table.is_cuda and table.dtype == torch.bfloat16):
        hidden, _ = batch.attend(model)
    losses, _ = frozen_head_cross_entropy(hidden, table, batch.targets)
    optimizer.zero_grad()
    losses.mean().backward()
    optimizer.step()
    return losses.detach().sum()


def best_epoch(epochs: list[Metric]) -> dict[str, Any]:
    """The epoch whose weights were kept: the last one that improved."""
    return next(metric for metric in reversed(epochs) if metric["improved"])
