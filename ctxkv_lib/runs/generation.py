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

COLDEST = 1e-6  # at this temperature or below, generation takes the most likely token


@friendly_errors()
def generate_text(run: Run | Path | str, prompt: str, **sampling: Any) -> str:
    """Generate text with a finished run. The result begins with `prompt`.

    Args:
        run: a run, or its folder.
        sampling: fields of `runs.config.Sampling`, such as `max_new_tokens=20`.

    Raises:
        UserError: The folder has no finished run, the prompt is empty, or a field or value is not allowed.
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
    """Draw tokens after `ids` until `end` is drawn or `max_new_tokens` is reached. `end` is left out."""
    new = list[int]()
    cache = read_stream(model, EXACT, torch.tensor([*ids, end]))  # `end` is a placeholder for the next token
    while len(new) < sampling.max_new_tokens:
        batch = model.batch(cache, torch.tensor([len(cache) - 1], device=model.device))
        token = _drawn(torch.cat([*model.predictions(batch)]), sampling)
        if token == end:
            break
        new.append(int(token))
        cache = _extended(model, cache, token)
    return new


def _drawn(logits: Tensor, sampling: Sampling) -> Tensor:
    """Draw a token, int64 `[1]`, from logits `[1, vocab_size]`, as transformers does."""
    if sampling.temperature <= COLDEST:
        return logits.argmax(dim=1)
    logits = logits.float() / sampling.temperature
    least = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf).softmax(dim=1).multinomial(1)[:, 0]


def _extended(model: ContextKV, cache: Cache, token: Tensor) -> Cache:
    """Insert a token, int64 `[1]`, before the placeholder, and append the context after that token."""
    ids = torch.cat([cache.ids[:-1], token.int(), cache.ids[-1:]])
    if cache.contexts is None:
        return Cache(ids)
    block = model.context_block
    context = block(cache.contexts[-1:], block.project_inputs(model.embed(token)))
    return Cache(ids, torch.cat([cache.contexts, context]))
