"""The optimizers of Phase 2: AdamW as published, and AdamW with the schedule of recipe `tuned`."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import Phase2Config

WARMUP = 0.05  # share of the planned steps during which the learning rate rises from 0
# Number of training tokens to which the setting `weight_decay` refers. For any other number, weight decay
# is scaled so that the decay per epoch stays the same.
DECAY_TOKENS = 50_000
EMA_DECAY = 0.99  # decay of the moving average of the weights; the average is validated and kept

Weights = Mapping[str, nn.Parameter]  # trained parameters by name


class Stepper:
    """AdamW with a constant learning rate, as published.

    Attributes:
        optimizer: the torch optimizer.
        averages: averaged weights by name, which are validated and kept instead of the trained weights. If
            the dict is empty, the trained weights are validated and kept.
    """

    def __init__(self, weights: Weights, config: Phase2Config, positions: int) -> None:
        """Make the optimizer; `positions` is the number of positions per epoch."""
        self.weights, self.averages = weights, dict[str, Tensor]()
        groups, fused = self.groups(config, positions), next(iter(weights.values())).device.type != "mps"
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)

    def groups(self, config: Phase2Config, positions: int) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, each with its weight decay."""
        return [{"params": [*self.weights.values()], "weight_decay": config.weight_decay}]

    def schedule(self, number: int) -> None:
        """Prepare step `number`, counted from 0. Here the learning rate is constant, so nothing changes."""

    def step(self) -> None:
        """Take one step with the current gradients, without waiting for a GPU."""
        self.optimizer.step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the model's weights by `averages`, if not empty, inside this context manager."""
        trained = {name: self.weights[name].data for name in self.averages}
        for name, average in self.averages.items():
            self.weights[name].data = average
        try:
            yield
        finally:
            for name, weight in trained.items():
                self.weights[name].data = weight


class ScheduledAdamW(Stepper):
    """AdamW with warm-up and cosine decay, weight decay on matrices only, and a moving average of weights."""

    def __init__(self, weights: Weights, config: Phase2Config, positions: int) -> None:
        super().__init__(weights, config, positions)
        # `update` is the weight of the current weights when `averages` is updated.
        self.learning_rate, self.update = config.learning_rate, 0.0
        self.steps = config.max_epochs * -(-positions // config.batch_size)  # steps in all epochs
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}

    def groups(self, config: Phase2Config, positions: int) -> list[dict[str, Any]]:
        """Return two parameter groups: matrices, and all other weights, which have no weight decay.

        The decay per epoch is the same for a text of any length. Reference: Wang and Aitchison (2024), who
        find that regularization depends on the decay per epoch.
        """
        matrices, others = list[nn.Parameter](), list[nn.Parameter]()
        for name, weight in self.weights.items():  # includes biases, which may have two dimensions
            is_matrix = weight.ndim > 1 and "weight" in name.rpartition(".")[2]
            (matrices if is_matrix else others).append(weight)
        decay = config.weight_decay * DECAY_TOKENS / positions
        return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]

    def schedule(self, number: int) -> None:
        risen = min(1.0, (number + 1) / max(1.0, WARMUP * self.steps))
        share = risen * (1 + math.cos(math.pi * number / self.steps)) / 2  # share of the learning rate
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * share
        self.update = 1 - min(EMA_DECAY, (2 + number) / (11 + number))  # larger in the first steps

    def step(self) -> None:
        super().step()
        weights = [weight.detach() for weight in self.weights.values()]
        torch._foreach_lerp_([*self.averages.values()], weights, self.update)
