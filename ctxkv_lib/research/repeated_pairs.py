"""Repeated text: test perplexity of tokens that form, with the one before, a pair of the recent text."""

from typing import Any

import torch
from torch import Tensor

from ..method.config import ModelConfig
from ..method.evaluation import perplexity
from ..method.model import ContextKV
from ..runs.config import ExperimentConfig
from ..runs.run_folder import RunFolder
from ..runs.testing import test_scores, test_stream

PAIRED_WITHIN = ModelConfig().context_window  # tokens back, in every run, so that runs can be compared


def of_run(config: ExperimentConfig, _: RunFolder, model: ContextKV) -> dict[str, Any]:
    """Compute `repeated_pairs` of the summary, on the test split.

    Returns:
        `ppl` and number of the `tokens` that form, with the one before, a pair that occurred in the last
        `PAIRED_WITHIN` tokens. Nothing if there are none.
    """
    if (stream := test_stream(config)) is None:
        return {}
    losses = test_scores(config, model, stream)[0].cpu()
    again = losses[since_last(pairs(stream.ids)) < min(PAIRED_WITHIN, len(losses))]
    return {"ppl": perplexity(again.mean().item()), "tokens": len(again)} if len(again) else {}


def pairs(ids: Tensor) -> Tensor:
    """Number each token of `ids` `[n + 1]` together with its next: int64 `[n]`, equal for equal pairs."""
    ids = ids.long()
    return ids[:-1] * (ids.max() + 1) + ids[1:]


def since_last(codes: Tensor) -> Tensor:
    """Compute the distance from each of `codes` `[n]` back to its last occurrence, int64 `[n]`; n if none."""
    order = codes.argsort(stable=True)
    same = codes[order[1:]] == codes[order[:-1]]
    since = torch.full_like(codes, len(codes))
    since[order[1:][same]] = order.diff()[same]
    return since
