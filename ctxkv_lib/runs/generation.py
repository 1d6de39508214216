"""Generate text with a finished run.

With transformers, the saved model generates the same text, but importing transformers takes seconds.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import as_user_errors, friendly_errors
from ..method.block import project_inputs
from ..method.model import ContextKV
from ..method.streams import Stream
from .config import Sampling, require_known
from .contexts import read_stream
from .device import torch_state
from .opened import EXACT, OpenRun, open_run, require_text
from .summary import Run

# At this temperature or below, generation always takes the most likely token.
COLDEST = 1e-6


@friendly_errors()
def generate_text(run: OpenRun | Run | Path | str, prompt: str, **sampling: Any) -> str:
    """Generate text with a finished run. The result begins with `prompt`.

    Args:
        run: a run, or its folder; or an open run, whose model may have any weights.
        sampling: settings for sampling, such as `max_new_tokens=20` (see `runs.config.Sampling`).

    Raises:
        UserError: The folder has no finished run, the prompt is empty, or a setting or value is not allowed.
    """
    for name in sampling:
        require_known("setting of sampling", name, [field.name for field in fields(Sampling)])
    with as_user_errors():
        chosen = Sampling(**sampling)
    require_text("prompt", prompt)
    opened = run if isinstance(run, OpenRun) else open_run(run, "auto")
    ids, end = opened.tokenizer(prompt)["input_ids"], int(opened.tokenizer.eos_token_id)
    with torch_state():
        torch.manual_seed(chosen.seed)
        new = generate_ids(opened.model, ids, chosen, end)
    return prompt + str(opened.tokenizer.decode(new, skip_special_tokens=True))


@torch.no_grad()
def generate_ids(model: ContextKV, ids: list[int], sampling: Sampling, end: int) -> list[int]:
    """Generate at most `max_new_tokens` tokens after `ids`. The token `end` ends the text and is left out."""
    new = list[int]()
    # The model never reads the last token of a stream, so `end` is only a placeholder for the next token.
    stream = read_stream(model, EXACT, torch.tensor([*ids, end]))
    while len(new) < sampling.max_new_tokens:
        batch = model.batch(stream, torch.tensor([len(stream) - 1], device=model.device))
        token = _drawn(torch.cat([*model.predictions(batch)]), sampling)
        if token == end:
            break
        new.append(int(token))
        stream = _extended(model, stream, token)
    return new


def _drawn(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sample a token, int64 `[1]`, from logits `[1, vocab_size]` in the same way as transformers."""
    if sampling.temperature <= COLDEST:
        return logits.argmax(dim=1)
    logits = logits.float() / sampling.temperature
    least = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf).softmax(dim=1).multinomial(1)[:, 0]


def _extended(model: ContextKV, stream: Stream, token: Tensor) -> Stream:
    """Insert a token, int64 `[1]`, before the placeholder at the end, and append its context."""
    ids = torch.cat([stream.ids[:-1], token.int(), stream.ids[-1:]])
    if stream.contexts is None:
        return Stream(ids)
    block = model.context_block
    context = block(stream.contexts[-1:], project_inputs(block, model.embed(token)))
    return Stream(ids, torch.cat([stream.contexts, context]))
