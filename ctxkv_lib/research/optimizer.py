"""Plug-in of recipes `tuned` and `look_up`: AdamW with a schedule, and an average of the weights."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..method.config import Phase2Config
from ..method.phase2 import Stepper
from ..method.settings import SHARE, Allowed, at_least, check_settings, setting


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of `ScheduledAdamW`; the defaults are the published optimiser."""

    schedule: str = setting(
        "constant",
        "of the learning rate",
        {"constant": "", "cosine": "down to 0 over all planned steps; the warm-up multiplies it"},
    )
    warmup: float = setting(0.0, "of the planned steps, over which the rate rises from 0", SHARE, "share")
    decayed: str = setting(
        "all",
        "which weights decay",
        {
            "all": "",
            "matrices": "those of linear layers, but not of a mixer's ContextBlock; no biases, no norms",
        },
    )
    decay_tokens: int = setting(
        0,
        "training tokens that weight_decay is meant for; with fewer or more, decay is the same an epoch, not "
        "a step; 0: a step",
        at_least(0),
        "tokens",
    )
    averaging: float = setting(
        0.0,
        "EMA decay of the weights, whose average is validated and kept; 0: no average",
        Allowed("0 or more, less than 1", lambda value: 0 <= value < 1),
        "share",
    )

    def __post_init__(self) -> None:
        check_settings(self, "optimizer")


class ScheduledAdamW(Stepper):
    """AdamW that changes its learning rate at every step, and may average the weights."""

    Settings = OptimizerSettings

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        config: Phase2Config,
        positions: int,
        settings: OptimizerSettings,
    ) -> None:
        self.settings, self.weights, self.learning_rate = settings, weights, config.learning_rate
        self.steps = config.max_epochs * -(-positions // config.batch_size)
        super().__init__(weights, config, positions)
        if settings.averaging:
            self.averages = {name: weight.detach().clone() for name, weight in weights.items()}
        rate = self.optimizer.defaults["lr"]
        self.update: float | Tensor = rate.new_zeros(()) if isinstance(rate, Tensor) else 0.0  # of `averages`

    def groups(
        self, weights: Mapping[str, nn.Parameter], config: Phase2Config, positions: int
    ) -> list[dict[str, Any]]:
        """Return the parameter groups, with the decay a step that `decay_tokens` asks for.

        Regularisation depends on the decay per epoch, not per step.

        Reference: Wang and Aitchison (2024), who confirm this over sizes of data and models.
        """
        tokens = self.settings.decay_tokens
        decayed: list[Tensor] = []
        no_decay: list[Tensor] = []
        for name, weight in weights.items():
            decays = self.settings.decayed == "all" or _is_matrix(name, weight)
            (decayed if decays else no_decay).append(weight)
        return [
            {"params": decayed, "weight_decay": config.weight_decay * (tokens / positions if tokens else 1)},
            {"params": no_decay, "weight_decay": 0.0},
        ]

    def schedule(self, number: int) -> None:
        rate = self.learning_rate * lr_lambda(number, self.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = _set(group["lr"], rate)
        decay = min(self.settings.averaging, (2 + number) / (11 + number))  # less while weights are new
        self.update = _set(self.update, 1 - decay)

    def step(self) -> None:
        super().step()
        averages, weights = [*self.averages.values()], [weight.detach() for weight in self.weights.values()]
        if not averages:
            return
        if isinstance(self.update, Tensor):
            moves = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(moves, self.update)
            torch._foreach_add_(averages, moves)
        else:
            torch._foreach_lerp_(averages, weights, self.update)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model compute with `averages` inside the block, if there are any."""
        trained = {name: self.weights[name].data for name in self.averages}
        for name, average in self.averages.items():
            self.weights[name].data = average
        try:
            yield
        finally:
            for name, weight in trained.items():
                self.weights[name].data = weight


def _set(held: float | Tensor, value: float) -> float | Tensor:
    """Return the value; a tensor, which a captured step reads, keeps its place."""
    return held.fill_(value) if isinstance(held, Tensor) else value


def _is_matrix(name: str, weight: Tensor) -> bool:
    """Return whether it is the matrix of a linear layer: a bias may have two dimensions, too.

    Decay would undo the init of a ContextBlock, whose recurrence stands in its weights.
    """
    return weight.ndim > 1 and "weight" in name.rpartition(".")[2] and "context_block." not in name


def lr_lambda(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Return a step's share of the learning rate; `steps` are those of all `max_epochs` epochs, from 0."""
    risen = min(1.0, (step + 1) / max(1.0, settings.warmup * steps))
    return risen if settings.schedule == "constant" else risen * (1 + math.cos(math.pi * step / steps)) / 2
