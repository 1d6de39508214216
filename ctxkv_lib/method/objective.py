"""The arguments of a Phase 1 objective. An objective receives the tensors that its parameters name.

An objective is a function, or an `nn.Module` class with a `forward` and a constructor that takes
`(context_dim, hidden_size)`. A module's weights are trained with the block and dropped after Phase 1. The
objective returns a scalar loss for a batch of n consecutive positions. Its parameters may be:

- `contexts`, `[n, context_dim]`: the contexts after reading the tokens. Their gradient trains the block.
- `previous`, `[n, context_dim]`: the contexts that the block received before reading the tokens. They are
  the previous iteration's contexts, one position earlier, with Phase 1's noise, and have no gradient.
- `embeddings`, `[n, hidden_size]`: the normed embeddings of the tokens that were read.
- `next_embeddings`, `[n, hidden_size]`: the normed embeddings of the tokens that follow. Every position has
  a next token, since Phase 1 does not read the last token of the text.

If an objective has none of these parameter names, its only argument is the contexts.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# Embeddings of the distinct tokens, float32 `[num_distinct, hidden_size]`, and a stream as row numbers in
# these embeddings, int64 `[n]`.
TokenRows = tuple[Tensor, Tensor]
TENSORS = ("contexts", "previous", "embeddings", "next_embeddings")
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def asked_tensors(objective: Callable[..., Any]) -> tuple[str, ...]:
    """Return which of `TENSORS` a function or module asks for, or () if it takes only contexts."""
    try:
        parameters = inspect.signature(getattr(objective, "forward", objective)).parameters.values()
    except ValueError:  # raised for some C functions
        return ()
    names = [parameter.name for parameter in parameters if parameter.kind in BY_NAME]
    asked = tuple(name for name in names if name in TENSORS)
    return () if asked == ("contexts",) else asked


@dataclass(frozen=True)
class Objective:
    """The loss that Phase 1 minimizes, and the tokens whose embeddings the loss may use.

    Attributes:
        compute: a function, or a module whose weights are trained with the block; see above for its
            arguments.
        tokens: the tokens that Phase 1 reads.
        next_tokens: the token after each of `tokens`; needed only if `compute` asks for `next_embeddings`.
    """

    compute: Callable[..., Tensor]
    tokens: TokenRows
    next_tokens: TokenRows | None = None

    @property
    def weights(self) -> list[nn.Parameter]:
        return [*self.compute.parameters()] if isinstance(self.compute, nn.Module) else []

    def loss(self, contexts: Tensor, previous: Tensor, positions: slice) -> Tensor:
        """Compute the loss of a batch; its `contexts` and `previous` contexts are `[n, context_dim]`."""
        if not (asked := asked_tensors(self.compute)):
            return self.compute(contexts)
        given = {"contexts": contexts, "previous": previous}
        for name, rows in (("embeddings", self.tokens), ("next_embeddings", self.next_tokens)):
            if name in asked and rows is not None:
                given[name] = F.embedding(rows[1][positions], rows[0])
        return self.compute(**{name: given[name] for name in asked})
