"""Compute how many bytes each model keeps per sequence, and how many multiplications a token needs.

All costs are computed from the shapes of tensors; nothing is measured. Each number in a vector is a float32
(4 bytes) and each token id is a uint16 (2 bytes), as in the package's caches.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from alternatives import CHOSEN
from small_models import GPT, LSTM
from torch import nn

from ctxkv_lib import ModelConfig
from ctxkv_lib.baselines import GRU, LastTokens
from ctxkv_lib.method.layer import AttentionLayer
from ctxkv_lib.method.tuned import SlotLayer

NUMBER, TOKEN_ID = 4, 2  # bytes


@dataclass(frozen=True)
class Cost:
    """The memory that a model keeps per sequence, and its multiplications per generated token.

    Only multiplications in matrix products are counted, without the output head.
    """

    # The model keeps data for this many of the latest tokens.
    span: float
    bytes_per_token: int
    multiplications: int | None = None

    def kept_bytes(self, tokens: int) -> int:
        """Return how many bytes the model keeps after it has read `tokens` tokens."""
        return int(min(tokens, self.span)) * self.bytes_per_token


def matrix_weights(module: nn.Module) -> int:
    """Count the weights in a module's matrices. Each of them is multiplied once per token."""
    weights = (weight for name, weight in module.named_parameters() if "weight" in name and weight.ndim == 2)
    return sum(weight.numel() for weight in weights)


@cache
def costs() -> dict[str, Cost]:
    """Return the cost of each model. The keys are the names of its rows in the results."""
    sizes, of_tokens = ModelConfig(), ModelConfig(context_dim=768, intermediate_size=2560)
    hidden, context, slots, heads = sizes.hidden_size, sizes.context_dim, sizes.max_contexts, sizes.num_heads
    block = (context + hidden) * context
    # The distance of the farthest slot in tokens.
    reach = sizes.interval * (slots - 1)
    chosen = {name: CHOSEN[name] for name in ("GPT", "LSTM")}
    with torch.device("meta"):
        layers: dict[str, Any] = {
            "exact": AttentionLayer(sizes),
            "tuned": SlotLayer(sizes, SlotLayer.Settings()),
            "tokens": SlotLayer(of_tokens, SlotLayer.Settings()),
            "all 640 tokens": LastTokens(sizes, LastTokens.Settings(history=sizes.context_window)),
            "GRU": GRU(sizes, GRU.Settings()),
            "LSTM": LSTM(hidden, chosen["LSTM"]["layers"], 0.0),
            "GPT": GPT(hidden, chosen["GPT"]["layers"], 0.0),
        }
    product = {name: matrix_weights(layer) for name, layer in layers.items()}
    # Every head multiplies every context twice: for its score and for the weighted sum.
    per_slot = 2 * heads * context
    exact = Cost(reach + 1, context * NUMBER, product["exact"] + block + slots * per_slot)
    tuned = Cost(reach + 1, context * NUMBER, product["tuned"] + block + slots * per_slot)
    # Copying compares the current context with all earlier contexts in the window.
    copying = context * reach
    length, width = layers["GPT"].positions.shape
    gpt = 2 * chosen["GPT"]["layers"] * width  # keys and values
    return {
        "exact": exact,
        "exact, one slot": Cost(1, context * NUMBER, product["exact"] + block + per_slot),
        "contexts": tuned,
        "contexts with copying": Cost(
            reach + 1, context * NUMBER + TOKEN_ID, product["tuned"] + block + slots * per_slot + copying
        ),
        "last 32 tokens": Cost(slots, TOKEN_ID, product["tokens"] + 2 * heads * slots * hidden),
        "all 640 tokens": Cost(640, 2 * hidden * NUMBER, product["all 640 tokens"] + 2 * 640 * hidden),
        "GRU": Cost(1, layers["GRU"].network.hidden_size * NUMBER, product["GRU"]),
        "LSTM": Cost(1, 2 * layers["LSTM"].lstm.hidden_size * NUMBER, product["LSTM"]),
        "GPT": Cost(length, gpt * NUMBER, product["GPT"] + length * gpt),
        "kneser_ney_caches": Cost(640, TOKEN_ID),
        "kneser_ney_table_caches": Cost(640, TOKEN_ID),
        "all tokens": Cost(torch.inf, 2 * hidden * NUMBER),
    }
