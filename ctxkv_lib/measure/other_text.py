"""Evaluate a trained model on other text. The contexts are exact, as in generation."""

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
from ..runs.contexts import read_stream
from ..runs.device import torch_state
from ..runs.opened import EXACT, open_run
from ..runs.summary import Run

# Bin edges for the number of preceding tokens in the conversation.
POSITION_BINS = (0, 16, 64, 256, 640, 1024, 4096, math.inf)
# Maximum mean word length in characters. If the mean is higher, spaces do not separate words.
LONGEST_WORD = 20


def score_texts(model: ContextKV, tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Measure how well the model predicts texts. Each text is read separately, after one end-of-text token.

    Returns:
        the numbers of `conversations` and `tokens`; `ppl`, the perplexity per token; `word_ppl`, the
        perplexity per word as in lm-evaluation-harness (None if it is infinite or if spaces do not separate
        words); `bits_per_byte`; and `accuracy`. `by_position` lists scores by the number of preceding tokens
        (see `binned`). If the model has contexts, `by_history` lists scores by the number of contexts in the
        window.
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
    """Return, for each token after the first, the loss in nats and whether the prediction is correct.

    Both tensors are on the CPU. The losses are float32, and the other tensor is bool.
    """
    stream = read_stream(model, EXACT, ids)
    losses, correct = token_scores(model, stream, torch.arange(len(stream)))
    return losses.cpu(), correct.cpu()


def word_count(texts: Sequence[str]) -> int:
    """Count words as lm-evaluation-harness does. Return 0 if spaces do not separate words, as in Japanese."""
    # Line breaks are not counted, since they separate messages and not words.
    spaces = sum(len(re.findall(r"[^\S\n]+", text)) for text in texts)
    if LONGEST_WORD * spaces < sum(map(len, texts)):
        return 0
    return sum(len(re.split(r"\s+", text)) for text in texts)


def binned(values: Tensor, edges: Sequence[float], losses: Tensor, correct: Tensor) -> list[dict[str, Any]]:
    """Score the tokens in each bin of `values`. A bin is `{from, to, tokens, ppl, accuracy}`.

    Empty bins are left out. If a bin has no upper limit, its `to` is None.
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
    """Measure how well the model of a finished run predicts other conversations.

    Args:
        run: a finished run, or its folder.
        data: a list with one text per conversation, a file, a folder of files, or the name of a data set on
            the Hub.
        split: the split to read, if `data` is a data set on the Hub.

    Returns:
        the result of `score_texts`, the `fingerprint` of the texts, and `file`, the file's name or None.

    Raises:
        UserError: the conversations cannot be read, a text is empty, or the run is not finished.
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
