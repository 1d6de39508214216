"""The test of a run: the losses of the trained model on the test conversations."""

from typing import Any

import torch

from ..method.scoring import perplexity, token_scores
from ..progress import status_line
from ..store import Work
from .build import load_weights
from .contexts import read_stream
from .plan import Plan


@status_line("Scoring the test split")
def score_test(plan: Plan, work: Work) -> dict[str, Any]:
    """Compute the perplexity and the accuracy on the test split.

    Returns:
        `ppl`; `acc`; `tokens`; `conversations`, a list with the number of predicted tokens and the mean loss
        in nats for each conversation; and `fingerprint`. If there is no token to predict, the dict is empty.
    """
    model, config, tokens = plan.model, plan.config, plan.tokens.get("test")
    if tokens is None or len(tokens.ids) < 2:
        return {}
    load_weights(model, work.folder)
    stream = read_stream(model, config.phase1, tokens.ids, config.runtime.seed)
    losses, correct = token_scores(model, stream, torch.arange(len(stream)))
    # There is no loss for token 0. `parts` has the losses of each conversation.
    parts = losses.tensor_split((tokens.starts[1:] - 1).clamp(min=0).cpu())
    return {
        "ppl": perplexity(losses.mean().item()),
        "acc": correct.float().mean().item(),
        "tokens": len(tokens.ids),
        "conversations": [[len(part), part.mean().item()] for part in parts if len(part)],
        "fingerprint": plan.texts["test"].fingerprint,
    }
