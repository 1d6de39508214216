"""How Phase 2 steps: AdamW, its schedule of learning rates, and the average of the weights on the way."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..hf.modeling import ContextKVForCausalLM
from ..runs.config import Phase2Config


def make_optimizer(model: ContextKVForCausalLM, config: Phase2Config, tokens: int) -> torch.optim.AdamW:
    """AdamW over what Phase 2 trains on so many tokens, as one fused kernel where there is one."""
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            (decayed if config.decayed == "all" or _is_matrix(name, weight) else spared).append(weight)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        weight_decay=weight_decay(config, tokens),
        fused=model.device.type != "mps",
    )


def _is_matrix(name: str, weight: Tensor) -> bool:
    """Whether it is the matrix of a linear layer: a bias may have two dimensions, too."""
    return weight.ndim > 1 and "weight" in name.rpartition(".")[2]


def weight_decay(config: Phase2Config, tokens: int) -> float:
    """That of a step. What regularises is how far weights decay in an epoch, whatever its number of steps.

    Wang and Aitchison (2024) found it so over sizes of data and models.

    Args:
        tokens: those of an epoch, one or more.
    """
    return config.weight_decay * (config.decay_tokens / tokens if config.decay_tokens else 1)


def rate_factor(step: int, steps: int, config: Phase2Config) -> float:
    """Share of the learning rate that a step takes.

    Args:
        step: from 0.
        steps: those of all `max_epochs` epochs.
    """
    risen = min(1.0, (step + 1) / max(1.0, config.warmup * steps))
    return risen if config.schedule == "constant" else risen * (1 + math.cos(math.pi * step / steps)) / 2


class Average:
    """An exponential average of weights: a step keeps at most so large a share of it.

    The first steps keep less, so that the untrained weights are soon forgotten.
    """

    def __init__(self, weights: Mapping[str, Tensor], kept: float) -> None:
        self.weights, self.kept = weights, kept
        self.values = {name: weight.detach().clone() for name, weight in weights.items()}

    def take_in(self, step: int) -> None:
        """After step number `step`, from 1."""
        kept = min(self.kept, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.values.values()), [w.detach() for w in self.weights.values()], 1 - kept
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model computes with the averages."""
        own = {name: weight.data for name, weight in self.weights.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.data = values[name]
