"""The recurrent block that Phase 1 trains: its interface, and the published ContextBlock."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Phase1Config

CONTEXT_WEIGHT_STD = 0.1
CONTEXT_BIAS_STD = 0.01


def attribute_or_default(part: nn.Module, name: str, base: type[nn.Module]) -> Any:
    """Return an optional attribute or method of a user's module, or the default that `base` defines."""
    if hasattr(part, name):
        return getattr(part, name)
    default = getattr(base, name)
    return partial(default, part) if callable(default) else default


def project_inputs(block: nn.Module, embeddings: Tensor) -> Tensor:
    """Return the argument `inputs` of a block's `forward`; see `Block.project_inputs`."""
    inputs: Tensor = attribute_or_default(block, "project_inputs", Block)(embeddings)
    return inputs


class Block(nn.Module):
    """The optional attributes and methods of a recurrent block, with their defaults.

    A block may inherit from this class, but any `nn.Module` will do (see `attribute_or_default`). Its
    constructor takes `(context_dim, hidden_size)`. `forward(contexts, inputs)` computes the next contexts
    `[n, context_dim]` from the previous contexts and from the output of `project_inputs`. Row i of the result
    depends only on row i of `contexts` and row i of `inputs`.

    Attributes:
        Settings: the dataclass of the constructor's argument `settings`; None if a block has no settings.
    """

    Settings: Any = None

    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Phase1Config) -> None:
        """Initialize the weights before Phase 1. The default keeps the weights from the constructor.

        `embeddings`, `[num_distinct, hidden_size]`, are the normed embeddings of the distinct training
        tokens; `tokens`, int64 `[n]`, is the training stream as row numbers in `embeddings`.
        """

    def project_inputs(self, embeddings: Tensor) -> Tensor:
        """Compute the argument `inputs` of `forward`. The default returns `embeddings`.

        `embeddings`, `[..., hidden_size]`, are normed token embeddings. Each distinct token of a stream is
        projected only once.
        """
        return embeddings


class ContextBlock(Block):
    """The published recurrence: `c' = LayerNorm(c + GELU(Linear(concat(c, x))))`."""

    def __init__(self, context_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.linear = nn.Linear(context_dim + hidden_size, context_dim)
        self.norm = nn.LayerNorm(context_dim)
        nn.init.normal_(self.linear.weight, std=CONTEXT_WEIGHT_STD)
        nn.init.normal_(self.linear.bias, std=CONTEXT_BIAS_STD)

    @torch.no_grad()
    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Phase1Config) -> None:
        """Scale the random weights from the constructor to the standard deviation `config.weight_std`."""
        self.linear.weight.mul_(config.weight_std / CONTEXT_WEIGHT_STD)

    def project_inputs(self, embeddings: Tensor) -> Tensor:
        """Compute the part of the Linear's output that depends only on the token, `[..., context_dim]`.

        If an adapter has replaced the Linear, return the embeddings unchanged, because the adapter needs
        context and embedding together.
        """
        if type(self.linear) is not nn.Linear:
            return embeddings
        return F.linear(embeddings, self.linear.weight[:, self.context_dim :], self.linear.bias)

    def forward(self, contexts: Tensor, inputs: Tensor) -> Tensor:
        """Compute the next contexts from previous contexts and projected inputs, all `[n, context_dim]`."""
        if type(self.linear) is nn.Linear:
            mixed = torch.addmm(inputs, contexts, self.linear.weight[:, : self.context_dim].T)
        else:
            mixed = self.linear(torch.cat([contexts, inputs], dim=-1))
        return self.norm(F.gelu(mixed).add_(contexts))
