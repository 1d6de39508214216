"""Reading a long history, and one token after another on it: Context-KV against a GPT-2 block."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from ...hf.cache import ContextCache
from ...hf.modeling import CACHE_NAME, ContextKVForCausalLM
from .measure import interleaved

HISTORIES = (640, 4_000, 32_000)  # tokens read before
TOKENS_A_ROUND = 8
PREFILL_ROUNDS = 3  # at most: the GPT-2 block reads its longest history for many seconds
Reader = Callable[[], Any]  # reads some tokens


def measure_generation(model: ContextKVForCausalLM, rounds: int) -> list[dict[str, float]]:
    """Speed and cache of both models, the same width, one layer, the same table as output head.

    For one token more, a history is put into the caches as random values: what they hold does not change the
    work. To be read, it is random tokens, of which more are different than in any text.

    Returns:
        a row a history: `history`, and for `ours` and `gpt2` `tokens_per_second`, `cache_bytes`,
        `bytes_per_position`, and `prefill_seconds` from the history's tokens to the logits of the next one.
    """
    model = model.eval()
    block = _gpt2_block(model)
    readers: dict[str, Reader] = {}
    prefill: dict[str, Reader] = {}
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
        tokens = torch.randint(model.config.vocab_size, (1, history), device=model.device)
        prefill[f"ours {history}"] = partial(_prefill, model, tokens)
        prefill[f"gpt2 {history}"] = partial(_prefill, block, tokens)
    seconds = interleaved(readers, rounds, model.device, "Generation")
    prefill_seconds = interleaved(prefill, min(rounds, PREFILL_ROUNDS), model.device, "Prefill")
    for row in rows:
        for name in ("ours", "gpt2"):
            row[f"{name}_tokens_per_second"] = TOKENS_A_ROUND / seconds[f"{name} {row['history']}"]
            row[f"{name}_prefill_seconds"] = prefill_seconds[f"{name} {row['history']}"]
    return rows


@torch.inference_mode()
def _read(model: Any, cache: Any) -> None:
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    for _ in range(TOKENS_A_ROUND):
        model(token, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})


@torch.inference_mode()
def _prefill(model: Any, tokens: Tensor) -> None:
    model(tokens, use_cache=True, logits_to_keep=1)


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
