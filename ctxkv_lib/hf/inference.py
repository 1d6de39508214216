"""Evaluate a trained model on other text."""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import DamagedFile
from ..files import read_json
from ..method.caches import StreamCache
from ..method.contexts import distinct_rows, exact_contexts
from ..method.evaluation import perplexity, token_scores
from ..method.loop import Loop
from ..method.model import project_inputs
from .copying_streams import as_served
from .modeling import TOLERANCE, ContextKVForCausalLM

POSITION_BINS = (0, 16, 64, 256, 640, 1024, 4096, math.inf)  # tokens of the conversation already read


@torch.no_grad()
def evaluate_texts(
    model: ContextKVForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    loop: Loop | None = None,
) -> dict[str, Any]:
    """Measure how well the model predicts each text, read separately after one end-of-text token.

    Args:
        loop: hooks, as for micro-batches when memory is full; None has none.

    Returns:
        `conversations`, `tokens`; `ppl` a token, `word_ppl` a word (as lm-evaluation-harness counts them;
        None where it is infinite, as in text without spaces), `bits_per_byte`, `accuracy`; `by_position` and
        `by_history`, as of `binned`: by tokens read before, and by contexts in the window.
    """
    cache, positions, local = _read_apart(model, tokenizer, texts)
    losses, correct = (scores.cpu() for scores in token_scores(model, cache, positions, loop))
    nats = losses.double().sum().item()
    word_ppl = perplexity(nats / sum(len(re.split(r"\s+", text)) for text in texts))
    slots = len(model.window)
    history = (model.window.slots(local) >= 0).sum(dim=-1)
    doubling = [2**k for k in range(slots.bit_length())]
    return {
        "conversations": len(texts),
        "tokens": len(losses),
        "ppl": perplexity(nats / len(losses)),
        "word_ppl": word_ppl if math.isfinite(word_ppl) else None,
        "bits_per_byte": nats / math.log(2) / sum(len(text.encode()) for text in texts),
        "accuracy": correct.double().mean().item(),
        "by_position": binned(local, POSITION_BINS, losses, correct),
        "by_history": binned(history, [*doubling, slots + 1], losses, correct),
    }


def evaluation_file(run: Path, data: Path, fingerprint: str) -> Path:
    """Return the JSON path for the scores of a file of conversations; the figure has the same name.

    It is named like the file, plus six digits of the fingerprint if another text of that name was evaluated
    before.
    """
    folder, name = run / "evaluation", Path(data.name.removesuffix(".gz")).stem
    plain = folder / f"{name}.json"
    with suppress(FileNotFoundError, DamagedFile, LookupError, TypeError):  # written anew
        if read_json(plain)["fingerprint"] != fingerprint:
            return folder / f"{name}-{fingerprint[:6]}.json"
    return plain


def _read_apart(
    model: ContextKVForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[StreamCache, Tensor, Tensor]:
    """Make one cache of all texts; return it, the positions to score, and these within their text (CPU)."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    pieces = [torch.tensor([tokenizer.eos_token_id, *ids]) for ids in encoded]
    lengths = torch.tensor([len(piece) for piece in pieces])
    ids = torch.cat(pieces).to(model.device)
    begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths).to(model.device)
    everything = torch.arange(len(ids), device=model.device)
    embeddings, tokens = distinct_rows(model, ids)
    inputs = project_inputs(model.context_block, embeddings)
    zero, is_first = inputs.new_zeros(model.config.context_dim), everything == begins
    contexts, _ = exact_contexts(model.context_block, inputs, tokens, TOLERANCE, is_first, before=zero)
    positions = everything[:-1][begins[1:] == begins[:-1]]
    cache = as_served(model, StreamCache(ids.int(), contexts, begins=begins))
    return cache, positions, (positions - begins[positions]).cpu()


def binned(
    values: Tensor, edges: Sequence[float], losses: Tensor, correct: Tensor
) -> list[dict[str, float | int | None]]:
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
