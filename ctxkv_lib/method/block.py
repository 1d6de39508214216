"""The recurrence that Phase 1 trains: the interface of a block, and the published ContextBlock."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Phase1Config

CONTEXT_WEIGHT_STD = 0.1
CONTEXT_BIAS_STD = 0.01


class Block(nn.Module):
    """The base class of recurrences, which defines a default for every optional attribute and method.

    A block is constructed from `(context_dim, hidden_size)`. `forward(contexts, inputs)` computes the next
    contexts `[n, context_dim]` from the previous contexts and from the output of `project_inputs`. Each row
    of the result depends only on the same row of both arguments.

    Attributes:
        Settings: a dataclass of settings, which is passed to the constructor as `settings`, or None.
        context_dim: the size of a context; the model sets it.
    """

    Settings: Any = None
    context_dim: int

    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Phase1Config) -> None:
        """Initialise the weights before Phase 1. The default keeps the weights from the constructor.

        `embeddings`, `[num_distinct, hidden_size]`, are the normed embeddings of the distinct training
        tokens; `tokens`, int64 `[n]`, is the training stream as row numbers in `embeddings`.
        """

    def project_inputs(self, embeddings: Tensor) -> Tensor:
        """Compute the `inputs` of `forward`, once per distinct token. The default returns `embeddings`.

        `embeddings` are normed token embeddings, `[..., hidden_size]`.
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
        """Scale the random weights of the constructor to the standard deviation `weight_std`."""
        self.linear.weight.mul_(config.weight_std / CONTEXT_WEIGHT_STD)

    def project_inputs(self, embeddings: Tensor) -> Tensor:
        """Compute the part of the Linear that depends on the token alone, `[..., context_dim]`.

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
