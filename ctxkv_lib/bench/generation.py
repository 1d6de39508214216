"""One token after another on a long history: Context-KV against a GPT-2 block with its key-value cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from ..model.context_cache import ContextCache
from ..model.modeling import CACHE_NAME, ContextKVForCausalLM
from .measure import interleaved

HISTORIES = (640, 4_000, 32_000)  # tokens read before
TOKENS_A_ROUND = 8
Reader = Callable[[], Any]  # reads some tokens, one by one


def measure_generation(model: ContextKVForCausalLM, rounds: int) -> list[dict[str, float]]:
    """Speed and cache of both models, the same width, one layer, the same table as output head.

    A history is put into the caches as random values: what they hold does not change the work.

    Returns:
        a row a history: `history`, and for `ours` and `gpt2` `tokens_per_second`, `cache_bytes` and
        `bytes_per_position`.
    """
    model = model.eval()
    block = _gpt2_block(model)
    readers: dict[str, Reader] = {}
    rows: list[dict[str, float]] = []
    for history in HISTORIES:
        ours, theirs = _context_cache(model, history), _key_value_cache(block, history)
        held = {"ours": ours.nbytes, "gpt2": _nbytes(theirs)}
        row: dict[str, float] = {"history": history}
        for name, num_bytes in held.items():
            row |= {f"{name}_cache_bytes": num_bytes, f"{name}_bytes_per_position": num_bytes / history}
        rows.append(row)
        readers[f"ours {history}"] = partial(_read, model, ours)
        readers[f"gpt2 {history}"] = partial(_read, block, theirs)
    seconds = interleaved(readers, rounds, model.device, "Generation")
    for row in rows:
        for name in ("ours", "gpt2"):
            row[f"{name}_tokens_per_second"] = TOKENS_A_ROUND / seconds[f"{name} {row['history']}"]
    return rows


@torch.inference_mode()
def _read(model: Any, cache: Any) -> None:
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    for _ in range(TOKENS_A_ROUND):
        model(token, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})


def _gpt2_block(model: ContextKVForCausalLM) -> GPT2LMHeadModel:
    shape = model.config
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_embd=shape.hidden_size,
        n_layer=1,
        n_head=shape.num_heads,
        n_inner=shape.intermediate_size,
        n_positions=2 * max(HISTORIES),
    )
    block: Any = GPT2LMHeadModel(config)
    block.to(model.device).eval()
    block.transformer.wte.weight = model.wte.weight
    block.lm_head.weight = model.wte.weight
    return block


def _context_cache(model: ContextKVForCausalLM, history: int) -> ContextCache:
    cache = ContextCache(model.config, 1, model.wte.weight)
    cache.stored.normal_()
    cache.state.normal_()
    cache.lengths += history
    cache.columns = history
    return cache


def _key_value_cache(block: GPT2LMHeadModel, history: int) -> DynamicCache:
    config = block.config
    shape = (1, config.n_head, history, config.n_embd // config.n_head)

    def random() -> Tensor:
        return torch.randn(shape, device=block.device)

    cache = DynamicCache()
    cache.update(random(), random(), 0)
    return cache


def _nbytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
