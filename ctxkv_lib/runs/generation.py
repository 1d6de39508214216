"""Generate text with a finished run.

The saved model generates the same text in transformers, but importing transformers' models takes seconds.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, as_user_errors, friendly_errors, is_utf8
from ..method.caches import Cache
from ..method.model import ContextKV
from .config import Sampling, require_known
from .device import torch_state
from .opened import open_run
from .summary import Run

COLDEST = 1e-6  # at this temperature or below, generation takes the most likely token


@friendly_errors()
def generate_text(run: Run | Path | str, prompt: str, **sampling: Any) -> str:
    """Generate text with a finished run; the result begins with `prompt`.

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
    if not prompt or not is_utf8(prompt):
        raise UserError("The prompt is empty or not UTF-8; give at least one character, in UTF-8.")
    opened, new = open_run(run, "auto"), list[int]()
    tokenizer = opened.tokenizer
    with torch_state(), torch.no_grad():
        torch.manual_seed(chosen.seed)
        text = _Text(opened.model, tokenizer(prompt)["input_ids"])
        for _ in range(chosen.max_new_tokens):
            token = _draw(text.next_logits(), chosen)
            if token == tokenizer.eos_token_id:
                break
            text.append(token)
            new.append(token)
    return prompt + str(tokenizer.decode(new))


class _Text:
    """A text that grows: its tokens and, if the layer reads contexts, the context after each token."""

    def __init__(self, model: ContextKV, tokens: Sequence[int]) -> None:
        self.model, self.tokens = model, list[int]()
        self.contexts = [torch.zeros(1, model.config.context_dim, device=model.device)]  # before the text
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Read one more token."""
        self.tokens.append(token)
        if block := self.model.context_block:
            inputs = block.project_inputs(self.model.embed(torch.tensor([token], device=self.model.device)))
            self.contexts.append(block(self.contexts[-1], inputs))

    def next_logits(self) -> Tensor:
        """Compute the logits of the next token, float32 `[vocab_size]`."""
        ids = torch.tensor([*self.tokens, 0], dtype=torch.int32)  # 0 stands for the next token
        contexts = torch.cat(self.contexts) if self.model.context_block else None
        batch = self.model.batch(Cache(ids, contexts), torch.tensor([len(self.tokens) - 1]))
        return torch.cat([*self.model.predictions(batch)])[0]


def _draw(logits: Tensor, sampling: Sampling) -> int:
    """Draw one of the `top_k` most likely tokens; `logits` are `[vocab_size]`."""
    if sampling.temperature <= COLDEST:
        return int(logits.argmax())
    likeliest = logits / sampling.temperature
    least = likeliest.topk(min(sampling.top_k, len(logits))).values[-1]
    return int(likeliest.masked_fill(likeliest < least, -torch.inf).softmax(dim=0).multinomial(1))
