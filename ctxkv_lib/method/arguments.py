"""Check the arguments of `modeling.ContextKVForCausalLM.forward`. This file is saved with every model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fields import require

# The options that `forward` accepts besides its named arguments.
OPTIONS = {"token_type_ids", "cache_position", "num_items_in_batch", "ignore_index", "shift_labels"}


def columns_read(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: Any,
    position_ids: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Return a mask, bool `[batch, length]`, which is False at padding.

    Raises ValueError for arguments that `forward` does not accept.
    """
    given = {name for name, value in options.items() if value is not None and value is not False}
    unknown = sorted(given - OPTIONS)
    require(not unknown, "an argument of forward", unknown, "the arguments that help(model.forward) lists")
    shape, allowed = () if input_ids is None else tuple(input_ids.shape), "[batch, length], both at least 1"
    require(len(shape) == 2 and 0 not in shape, "input_ids.shape", shape, allowed)
    assert input_ids is not None
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    fits = mask.ndim == 2 and len(mask) == shape[0] and mask.shape[1] >= shape[1]
    # The dtype is formatted only on failure, because `torch.compile` cannot format dtypes.
    if not fits or mask.is_floating_point():
        told = f"{mask.dtype} {tuple(mask.shape)}".removeprefix("torch.")
        allowed = "[batch, length or more], 1 where a column is read, 0 where it is padding"
        require(False, "attention_mask", told, allowed)
    is_read = mask[:, -shape[1] :].bool()
    is_first = cache is None or not cache.get_seq_length()
    # Only the first call is checked, because the check makes the CPU wait for the GPU.
    if position_ids is not None and is_first:
        moved = bool(((position_ids != is_read.cumsum(dim=1) - 1) & is_read).any())
        allowed = "positions that grow by 1 per token; packed texts must be separate rows"
        require(not moved, "position_ids", "restarted", allowed)
    return is_read


def next_tokens(
    input_ids: Tensor, labels: Tensor | None, shift_labels: Tensor | None, ignored: int
) -> Tensor | None:
    """Return the token to predict at each column, int64 `[batch, length]`, or None if there are no labels."""
    targets = shift_labels
    if targets is None and labels is not None:
        targets = F.pad(labels, (0, 1), value=ignored)[:, 1:]
    if targets is not None:
        shape, allowed = tuple(targets.shape), tuple(input_ids.shape)
        require(shape == allowed, "labels.shape", shape, f"{allowed}, as input_ids")
    return targets
