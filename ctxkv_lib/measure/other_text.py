"""Evaluate a trained model on other text, read as generation reads it."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.conversations import Conversations
from ..data.texts import read_texts
from ..errors import UserError, friendly_errors
from ..method.modeling import CACHE_NAME, ContextKVForCausalLM
from ..method.scoring import perplexity
from ..runs.device import torch_state
from ..runs.export import for_transformers
from ..runs.opened import open_run
from ..runs.summary import Run

POSITION_BINS = (0, 16, 64, 256, 640, 1024, 4096, math.inf)  # tokens of the conversation already read
LONGEST_WORD = 20  # characters on average; where spaces are rarer, they do not separate words
READ_AT_ONCE = 1024  # tokens, which bounds the memory of their logits


def score_texts(model: ContextKVForCausalLM, tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Measure how well the model predicts each text, read separately after one end-of-text token.

    Returns:
        `conversations`, `tokens`; `ppl` a token, `word_ppl` a word (as lm-evaluation-harness counts them;
        None where it is infinite, or the text has no spaces), `bits_per_byte`, `accuracy`; `by_position` and
        `by_history`, as of `binned`: by tokens read before, and by contexts in the window.
    """
    encoded = [ids for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] if ids]
    scored = [_scores(model, torch.tensor([tokenizer.eos_token_id, *ids])) for ids in encoded]
    losses, correct = (torch.cat(scores) for scores in zip(*scored, strict=True))
    places = torch.cat([torch.arange(len(ids)) for ids in encoded])
    nats, slots = losses.double().sum().item(), len(model.model.window.offsets)
    words = word_count(texts)
    word_ppl = perplexity(nats / words) if words else math.inf
    history = (model.model.window.slots(places) >= 0).sum(dim=-1)
    doubling = [2**k for k in range(slots.bit_length())]
    return {
        "conversations": len(texts),
        "tokens": len(losses),
        "ppl": perplexity(nats / len(losses)),
        "word_ppl": word_ppl if math.isfinite(word_ppl) else None,
        "bits_per_byte": nats / math.log(2) / sum(len(text.encode()) for text in texts),
        "accuracy": correct.double().mean().item(),
        "by_position": binned(places, POSITION_BINS, losses, correct),
        "by_history": binned(history, [*doubling, slots + 1], losses, correct),
    }


def word_count(texts: Sequence[str]) -> int:
    """Count words as lm-evaluation-harness does; 0 if spaces separate none, as in Chinese and Japanese."""
    spaces = sum(len(re.findall(r"[^\S\n]+", text)) for text in texts)  # line breaks also separate messages
    if LONGEST_WORD * spaces < sum(map(len, texts)):
        return 0
    return sum(len(re.split(r"\s+", text)) for text in texts)


@torch.no_grad()
def _scores(model: ContextKVForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute loss in nats and correctness of each token after the first: float32 and bool, on the CPU."""
    ids, cache, losses, correct = ids.to(model.device), None, [], []
    for start in range(0, len(ids) - 1, READ_AT_ONCE):
        targets = ids[start + 1 :][:READ_AT_ONCE]
        output = model(ids[None, start : start + len(targets)], use_cache=True, **{CACHE_NAME: cache})
        cache, logits = output[CACHE_NAME], output.logits[0].float()
        losses.append(F.cross_entropy(logits, targets, reduction="none").cpu())
        correct.append((logits.gather(1, targets[:, None])[:, 0] == logits.amax(dim=1)).cpu())
    return torch.cat(losses), torch.cat(correct)


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
    model, tokenizer = for_transformers(opened.model, opened.run.config, opened.tokenizer)
    source = {"file": file, "fingerprint": conversations.fingerprint}
    with torch_state():
        return source | score_texts(model, tokenizer, conversations.texts)
