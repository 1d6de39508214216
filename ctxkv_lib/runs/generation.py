"""Generate text with a finished run."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, as_user_errors, friendly_errors, is_utf8
from .config import Sampling, require_known
from .device import torch_state
from .export import for_transformers
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
    opened = open_run(run, "auto")
    model, tokenizer = for_transformers(opened.model, opened.run.config, opened.tokenizer)
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    options: dict[str, Any] = {"do_sample": False}
    if chosen.temperature > COLDEST:
        options = {"do_sample": True, "temperature": chosen.temperature, "top_k": chosen.top_k}
    with torch_state():
        torch.manual_seed(chosen.seed)
        ids = model.generate(**encoded, max_new_tokens=chosen.max_new_tokens, **options)
    new = ids[0, encoded["input_ids"].shape[1] :]
    return prompt + str(tokenizer.decode(new, skip_special_tokens=True))
