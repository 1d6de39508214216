"""Repetition in generated text: greedy continuations of validation text, compared with the text itself."""

from collections.abc import Sequence
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.tokens import load_tokenizer
from ..hf.modeling import ContextKVForCausalLM
from ..method.model import ContextKV
from ..runs.caches import load_ids
from ..runs.config import ExperimentConfig
from ..runs.run_folder import RunFolder
from ..runs.trained import for_transformers

SAMPLES = 20
PROMPT = 32  # tokens
GENERATED = 50  # tokens at most


def of_run(config: ExperimentConfig, folder: RunFolder, model: ContextKV) -> dict[str, Any]:
    """Compute `generation` of the summary on a run's validation stream."""
    served = for_transformers(model, config, saved=False)
    return generation(served, load_tokenizer(config.data.tokenizer), load_ids(folder.caches, "val"))


@torch.no_grad()
def generation(
    model: ContextKVForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: Tensor
) -> dict[str, Any]:
    """Continue prompts greedily.

    Args:
        ids: int `[n]`, the validation stream; the prompts are cut out of it, evenly spaced.

    Returns:
        `samples`; `longest_run`, of one token in any sample; `repeated`, the share of tokens that occurred
        earlier in their sample; `text`, both numbers of the real continuations; and the first prompt with
        its continuation as `sample`: `{prompt, generated}`. Nothing if the stream is too short for one.
    """
    last = len(ids) - PROMPT - GENERATED
    if last < 0:
        return {}
    starts = torch.linspace(0, last, SAMPLES).long()
    rows = ids.long().cpu()[starts[:, None] + torch.arange(PROMPT + GENERATED)]
    prompts = rows[:, :PROMPT].to(model.device)
    made = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=GENERATED, do_sample=False
    )
    end = tokenizer.eos_token_id  # padding follows there
    continued = [list(takewhile(lambda token: token != end, row)) for row in made[:, PROMPT:].tolist()]
    return {
        "samples": SAMPLES,
        **repetition(continued),
        "text": repetition(rows[:, PROMPT:].tolist()),
        "sample": {"prompt": tokenizer.decode(rows[0, :PROMPT]), "generated": tokenizer.decode(continued[0])},
    }


def repetition(samples: Sequence[Sequence[int]]) -> dict[str, float]:
    """Count the `longest_run` of one token in a sample, and the share of tokens `repeated` within theirs."""
    runs = [sum(1 for _ in run) for sample in samples for _, run in groupby(sample)]
    distinct, count = sum(len(set(sample)) for sample in samples), sum(map(len, samples))
    return {"longest_run": max(runs, default=0), "repeated": 1 - distinct / count if count else 0.0}
