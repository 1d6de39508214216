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
from typing import Any

TENSORS = ("contexts", "previous", "embeddings", "next_embeddings")
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def asked_tensors(objective: Callable[..., Any]) -> tuple[str, ...]:
    """Return which of `TENSORS` a function or module asks for, or () if it takes only contexts."""
    try:
        parameters = inspect.signature(getattr(objective, "forward", objective)).parameters.values()
    except ValueError:  # raised for some C functions
        return ()
    asked = tuple(each.name for each in parameters if each.name in TENSORS and each.kind in BY_NAME)
    return () if asked == ("contexts",) else asked
