"""Evaluate a trained model on other text, with exact contexts, as generation reads it."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.conversations import Conversations
from ..data.texts import read_texts
from ..errors import UserError, friendly_errors
from ..method.model import ContextKV
from ..method.scoring import perplexity, token_scores
from ..runs.device import torch_state
from ..runs.opened import EXACT, open_run
from ..runs.stages import read_stream
from ..runs.summary import Run

POSITION_BINS = (0, 16, 64, 256, 640, 1024, 4096, math.inf)  # tokens of the conversation already read
LONGEST_WORD = 20  # characters on average; where spaces are rarer, they do not separate words


def score_texts(model: ContextKV, tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Measure how well the model predicts each text, read separately after one end-of-text token.

    Returns:
        `conversations`, `tokens`; `ppl` per token, `word_ppl` per word (words as lm-evaluation-harness counts
        them; None if it is infinite or the text has no spaces), `bits_per_byte`, `accuracy`; and, in the form
        of `binned`, `by_position` (tokens read before) and `by_history` (contexts in the window), the latter
        only if the model has contexts.
    """
    encoded = [ids for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] if ids]
    scored = [_scores(model, torch.tensor([tokenizer.eos_token_id, *ids])) for ids in encoded]
    losses, correct = (torch.cat(scores) for scores in zip(*scored, strict=True))
    places = torch.cat([torch.arange(len(ids)) for ids in encoded])
    nats, words = losses.double().sum().item(), word_count(texts)
    word_ppl = perplexity(nats / words) if words else math.inf
    scores = {
        "conversations": len(texts),
        "tokens": len(losses),
        "ppl": perplexity(nats / len(losses)),
        "word_ppl": word_ppl if math.isfinite(word_ppl) else None,
        "bits_per_byte": nats / math.log(2) / sum(len(text.encode()) for text in texts),
        "accuracy": correct.double().mean().item(),
        "by_position": binned(places, POSITION_BINS, losses, correct),
    }
    if model.window.offsets is not None:
        history = (model.window.slots(places) >= 0).sum(dim=-1)
        slots = len(model.window.offsets)
        edges = [*(2**k for k in range(slots.bit_length())), slots + 1]
        scores["by_history"] = binned(history, edges, losses, correct)
    return scores


def _scores(model: ContextKV, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute loss in nats and correctness of each token after the first: float32 and bool, on the CPU."""
    cache = read_stream(model, EXACT, ids)
    losses, correct = token_scores(model, cache, torch.arange(len(cache)))
    return losses.cpu(), correct.cpu()


def word_count(texts: Sequence[str]) -> int:
    """Count words as lm-evaluation-harness does; 0 if spaces separate none, as in Chinese and Japanese."""
    spaces = sum(len(re.findall(r"[^\S\n]+", text)) for text in texts)  # line breaks also separate messages
    if LONGEST_WORD * spaces < sum(map(len, texts)):
        return 0
    return sum(len(re.split(r"\s+", text)) for text in texts)


def binned(values: Tensor, edges: Sequence[float], losses: Tensor, correct: Tensor) -> list[dict[str, Any]]:
    """Score the tokens from each edge of `values` up to the next: `{from, to, tokens, ppl, accuracy}` each.

    Empty bins are left out; `to` is None after an edge of infinity.
    """
    bins = ((start, stop, (values >= start) & (values < stop)) for start, stop in pairwise(edges))
    return [
        {
            "from": start,
            "to": None if stop == math.inf else stop - 1,
            "tokens": int(chosen.sum()),
            "ppl": perplexity(losses[chosen].double().mean().item()),
            "accuracy": correct[chosen].double().mean().item(),
        }
        for start, stop, chosen in bins
        if chosen.any()
    ]


@friendly_errors()
def evaluate_texts(
    run: Run | Path | str, data: Sequence[str] | Path | str, split: str | None = None
) -> dict[str, Any]:
    """Measure how well a finished run predicts other conversations.

    Args:
        run: a finished run, or its folder.
        data: a list of texts, one per conversation; or a file, a folder of files, or the name of a data set
            on the Hub.
        split: which split of a data set on the Hub is read.

    Returns:
        the result of `score_texts`, with the `fingerprint` of the texts and their `file`'s name, or None.

    Raises:
        UserError: the conversations cannot be read, a text is empty, or there is no finished run.
    """
    file = Path(data).name if isinstance(data, Path | str) else None
    texts = read_texts(data, split) if isinstance(data, Path | str) else [*data]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"data is {data!r}; allowed: a list of texts that are not empty, or a file.")
    conversations = Conversations.of(texts)
    opened = open_run(run, "auto")
    source = {"file": file, "fingerprint": conversations.fingerprint}
    with torch_state():
        return source | score_texts(opened.model, opened.tokenizer, conversations.texts)
