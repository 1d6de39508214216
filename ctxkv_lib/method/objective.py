"""The arguments of a Phase 1 objective, which asks for tensors by the names of its parameters.

An objective is a function, or the `forward` of an `nn.Module` class that is constructed from
`(context_dim, hidden_size)`. The module's weights are trained with the block and dropped after Phase 1. An
objective returns a scalar for a batch of n consecutive positions. Its parameters may be:

- `contexts`, `[n, context_dim]`: the contexts after reading the tokens. Their gradient trains the block.
- `previous`, `[n, context_dim]`: the contexts before reading the tokens, as the block got them: the
  previous iteration's contexts, one position earlier, with Phase 1's noise. They have no gradient.
- `embeddings`, `[n, hidden_size]`: the normed embeddings of the tokens that were read.
- `next_embeddings`, `[n, hidden_size]`: the normed embeddings of the tokens that follow. Every position has
  a next token, since Phase 1 does not read the last token of the text.

An objective without any of these parameter names is called with the contexts alone.
"""

import inspect
from collections.abc import Callable
from typing import Any

TENSORS = ("contexts", "previous", "embeddings", "next_embeddings")
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def asked_tensors(objective: Callable[..., Any]) -> tuple[str, ...]:
    """Return which of `TENSORS` a function or module asks for; () if it takes only contexts, by position."""
    try:
        parameters = inspect.signature(getattr(objective, "forward", objective)).parameters.values()
    except ValueError:  # a function that is written in C may have no signature
        return ()
    asked = tuple(each.name for each in parameters if each.name in TENSORS and each.kind in BY_NAME)
    return () if asked == ("contexts",) else asked
