"""How Phase 2 steps: AdamW as published, or with the schedule and averages of recipe `tuned`."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import Phase2Config

WARMUP = 0.05  # share of the planned steps, over which the rate rises from 0
DECAY_TOKENS = 50_000  # training tokens that weight_decay is meant for; with others it is the same an epoch
EMA_DECAY = 0.99  # of the average of the weights, which is validated and kept

Weights = Mapping[str, nn.Parameter]  # what is trained, by name


class Stepper:
    """AdamW at a constant rate, as published.

    Attributes:
        optimizer: its gradients are set to zero before each step; a stopped run keeps its state.
        averages: weights by name that are validated and kept in the place of the trained ones; empty: these.
    """

    def __init__(self, weights: Weights, config: Phase2Config, positions: int) -> None:
        """Make the optimiser; `positions` are those of an epoch."""
        self.weights, self.averages = weights, dict[str, Tensor]()
        groups, fused = self.groups(config, positions), next(iter(weights.values())).device.type != "mps"
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)

    def groups(self, config: Phase2Config, positions: int) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups, each with its weight decay."""
        return [{"params": [*self.weights.values()], "weight_decay": config.weight_decay}]

    def schedule(self, number: int) -> None:
        """Set what `step` takes from its number, from 0: here nothing, as the rate is constant."""

    def step(self) -> None:
        """Take one step with the gradients that are there; no part of it may wait for a GPU."""
        self.optimizer.step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model compute with `averages`, if there are any, inside this context manager."""
        trained = {name: self.weights[name].data for name in self.averages}
        for name, average in self.averages.items():
            self.weights[name].data = average
        try:
            yield
        finally:
            for name, weight in trained.items():
                self.weights[name].data = weight


class ScheduledAdamW(Stepper):
    """AdamW with a warm-up and a cosine, weight decay on matrices only, and an average of the weights."""

    def __init__(self, weights: Weights, config: Phase2Config, positions: int) -> None:
        super().__init__(weights, config, positions)
        self.learning_rate, self.update = config.learning_rate, 0.0  # of `averages`
        self.steps = config.max_epochs * -(-positions // config.batch_size)  # of all epochs
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}

    def groups(self, config: Phase2Config, positions: int) -> list[dict[str, Any]]:
        """Return matrices and other weights; the decay of an epoch is the same, however long the text.

        Reference: Wang and Aitchison (2024), who find that regularisation depends on the decay an epoch.
        """
        matrices, others = list[nn.Parameter](), list[nn.Parameter]()
        for name, weight in self.weights.items():  # a bias may have two dimensions, too
            is_matrix = weight.ndim > 1 and "weight" in name.rpartition(".")[2]
            (matrices if is_matrix else others).append(weight)
        decay = config.weight_decay * DECAY_TOKENS / positions
        return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]

    def schedule(self, number: int) -> None:
        risen = min(1.0, (number + 1) / max(1.0, WARMUP * self.steps))
        share = risen * (1 + math.cos(math.pi * number / self.steps)) / 2  # of the learning rate
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * share
        self.update = 1 - min(EMA_DECAY, (2 + number) / (11 + number))  # more while weights are new

    def step(self) -> None:
        super().step()
        weights = [weight.detach() for weight in self.weights.values()]
        torch._foreach_lerp_([*self.averages.values()], weights, self.update)
