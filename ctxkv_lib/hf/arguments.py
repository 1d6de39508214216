"""What the forward pass of the transformers model is given, checked before anything is computed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..method.settings import require
from .cache import ContextCache

# What transformers 5.24 renamed.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
OPTIONS = {"position_ids", "token_type_ids", "cache_position"}  # and of a loss:
OPTIONS |= {"num_items_in_batch", "ignore_index", "shift_labels"}


def check_arguments(input_ids: Tensor, options: dict[str, Any]) -> None:
    """Raise ValueError if there is nothing to read, or an option that `forward` does not know."""
    kind = type(input_ids).__name__
    require(isinstance(input_ids, Tensor), "input_ids", kind, "a tensor; unpack a tokenizer's result with **")
    shape = tuple(input_ids.shape)
    fits = len(shape) == 2 and 0 not in shape
    require(fits, "input_ids.shape", shape, "one row and one token or more, as [batch, length]")
    given = {name for name, value in options.items() if value is not None and value is not False}
    unknown = ", ".join(sorted(given - OPTIONS))
    require(not unknown, "an argument of forward", unknown, "those that help(model.forward) lists")
    segments = options.get("token_type_ids")
    require(segments is None or not segments.any(), "token_type_ids", "not 0", "0 everywhere")


def own_cache(cache: Cache | None) -> ContextCache | None:
    """Return a cache to read on from; raises ValueError if a model of another kind has filled it."""
    if cache is None or isinstance(cache, ContextCache):
        return cache
    empty = isinstance(cache, Cache) and not cache.get_seq_length()
    require(empty, CACHE_NAME, type(cache).__name__, "None, or the ContextCache that this model returned")
    return None


def columns_read(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: ContextCache
) -> Tensor:
    """Return which columns are no padding, bool `[batch, length]`; raises the ValueErrors of `forward`."""
    batch, length = input_ids.shape
    require(len(cache.state) == batch, f"{CACHE_NAME}'s batch", len(cache.state), f"{batch}, as of input_ids")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    shape = tuple(mask.shape)
    fits = len(shape) == 2 and shape[0] == batch and shape[1] >= length
    require(fits, "attention_mask.shape", shape, f"({batch}, {length} or more)")
    is_additive = mask.is_floating_point() and bool((mask < 0).any())
    require(not is_additive, "attention_mask", "additive", "1 where a column is read, 0 where it is padding")
    earlier, read = mask.bool().split([shape[1] - length, length], dim=1)
    if earlier.shape[1]:
        kept, held = earlier.sum(dim=1).tolist(), cache.lengths.tolist()
        allowed = f"{held}, as many as the cache has read; a mask of the new columns alone will do"
        require(kept == held, "the number of earlier tokens that attention_mask keeps", kept, allowed)
    if position_ids is not None:
        shape = tuple(position_ids.shape)
        fits = len(shape) > 0 and shape[-1] >= length and shape[:-1] in ((), (1,), (batch,))
        require(fits, "position_ids.shape", shape, f"({batch}, {length} or more)")
        found, expected = position_ids[..., -length:], cache.lengths[:, None] + read.cumsum(dim=1) - 1
        wrong = found.expand_as(read)[read & (found != expected)][:1].tolist()
        require(not wrong, "a position id", wrong, "one more each token; packed texts must be separate rows")
    return read


def following_labels(
    input_ids: Tensor,
    labels: Tensor,
    num_tokens: int,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return the label after each column, `[batch, length]`; raises the ValueErrors of `forward`."""
    given, shape = labels if shift_labels is None else shift_labels, tuple(input_ids.shape)
    require(given.shape == shape, "labels.shape", tuple(given.shape), f"{shape}, as input_ids")
    following = F.pad(labels, (0, 1), value=ignore_index)[:, 1:] if shift_labels is None else given
    if following.device.type == "cpu":  # a GPU would wait for this, and itself stops at such an index
        targets = following[following != ignore_index]
        wrong = targets[(targets < 0) | (targets >= num_tokens)][:1].tolist()
        require(not wrong, "a label", wrong, f"0 to {num_tokens - 1}, or {ignore_index} to ignore it")
    return following
