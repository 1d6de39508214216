"""Generate text with a finished run.

With transformers, the saved model generates the same text, but importing transformers takes seconds.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import as_user_errors, friendly_errors
from ..method.caches import Cache
from ..method.model import ContextKV
from .config import Sampling, require_known
from .device import torch_state
from .opened import EXACT, open_run, require_text
from .stages import read_stream
from .summary import Run

# At this temperature or below, generation always takes the most likely token.
COLDEST = 1e-6


@friendly_errors()
def generate_text(run: Run | Path | str, prompt: str, **sampling: Any) -> str:
    """Generate text with a finished run. The result begins with `prompt`.

    Args:
        run: a run, or its folder.
        sampling: settings for sampling, such as `max_new_tokens=20` (see `runs.config.Sampling`).

    Raises:
        UserError: The folder has no finished run, the prompt is empty, or a setting or value is not allowed.
    """
    for name in sampling:
        require_known("setting of sampling", name, [field.name for field in fields(Sampling)])
    with as_user_errors():
        chosen = Sampling(**sampling)
    require_text("prompt", prompt)
    opened = open_run(run, "auto")
    ids, end = opened.tokenizer(prompt)["input_ids"], int(opened.tokenizer.eos_token_id)
    with torch_state():
        torch.manual_seed(chosen.seed)
        new = continued(opened.model, ids, chosen, end)
    return prompt + str(opened.tokenizer.decode(new, skip_special_tokens=True))


@torch.no_grad()
def continued(model: ContextKV, ids: list[int], sampling: Sampling, end: int) -> list[int]:
    """Generate at most `max_new_tokens` tokens after `ids`. The token `end` ends the text and is left out."""
    new = list[int]()
    # The model never reads the last token of a cache, so `end` is only a placeholder for the next token.
    cache = read_stream(model, EXACT, torch.tensor([*ids, end]))
    while len(new) < sampling.max_new_tokens:
        batch = model.batch(cache, torch.tensor([len(cache) - 1], device=model.device))
        token = _drawn(torch.cat([*model.predictions(batch)]), sampling)
        if token == end:
            break
        new.append(int(token))
        cache = _extended(model, cache, token)
    return new


def _drawn(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sample a token, int64 `[1]`, from logits `[1, vocab_size]` in the same way as transformers."""
    if sampling.temperature <= COLDEST:
        return logits.argmax(dim=1)
    logits = logits.float() / sampling.temperature
    least = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf).softmax(dim=1).multinomial(1)[:, 0]


def _extended(model: ContextKV, cache: Cache, token: Tensor) -> Cache:
    """Insert a token, int64 `[1]`, before the placeholder at the end of the cache, and append its context."""
    ids = torch.cat([cache.ids[:-1], token.int(), cache.ids[-1:]])
    if cache.contexts is None:
        return Cache(ids)
    block = model.context_block
    context = block(cache.contexts[-1:], block.project_inputs(model.embed(token)))
    return Cache(ids, torch.cat([cache.contexts, context]))
