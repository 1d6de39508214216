"""Compute the numbers that notebooks show of data, contexts and trained runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.conversations import Conversations, load_conversations
from ..data.tokens import TokenStream, load_tokenizer, train_stream, validation_stream
from ..errors import UserError
from ..method.caches import StreamCache
from ..method.config import ModelConfig, Phase1Config
from ..method.contexts import distinct_rows, draw_contexts, exact_contexts, parallel_pass
from ..method.model import ContextBlock, ContextKV, project_inputs
from ..report.info import context_window
from ..report.tables import percent, ppl
from ..report.verdicts import epoch_note
from ..runs.caches import load_cache
from ..runs.config import ExperimentConfig
from ..runs.published import PUBLISHED
from ..runs.rows import as_read
from ..runs.run_folder import Run, load_run, refuse_damaged
from ..runs.trained import load_model

SPLITS = ("val", "train")


def check_split(split: str) -> None:
    """Refuse the name of a stream that is not there."""
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; allowed: {', '.join(SPLITS)}.")


@dataclass(frozen=True)
class Corpus:
    """The text of an experiment, tokenised."""

    tokenizer: PreTrainedTokenizerBase
    conversations: Mapping[str, Conversations]  # "train" and "val"
    streams: Mapping[str, TokenStream]

    def lengths(self, split: str) -> Tensor:
        """Return the number of tokens of each conversation, int64 `[num_conversations]`."""
        stream = self.streams[split]
        return torch.diff(stream.starts, append=torch.tensor([len(stream.ids)]))

    def pieces(self, split: str, conversation: int, most: int) -> list[str]:
        """Return the first `most` tokens of a conversation, each as text.

        Raises:
            UserError: no such split or conversation.
        """
        check_split(split)
        stream, lengths = self.streams[split], self.lengths(split).tolist()
        if conversation not in range(len(lengths)):
            allowed = f"allowed in {split}: 0 to {len(lengths) - 1}"
            raise UserError(f"conversation is {conversation}; {allowed}.")
        start, length = int(stream.starts[conversation]), lengths[conversation]
        return token_texts(self.tokenizer, stream.ids[start : start + min(most, length)])


def load_corpus(config: ExperimentConfig) -> Corpus:
    """Read and tokenise the conversations that `config.data` names.

    Raises:
        UserError: a source is missing, damaged, too small or unreachable.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    train, val = (load_conversations(config.data, split) for split in ("train", "validation"))
    streams = {"train": train_stream(train, tokenizer), "val": validation_stream(val, tokenizer)}
    return Corpus(tokenizer, {"train": train, "val": val}, streams)


def count_rows(config: ExperimentConfig, corpus: Corpus) -> list[list[str]]:
    """Make table rows of counts: of this run, and of the published report's 500-sample run."""
    train, val = (len(corpus.streams[split].ids) for split in ("train", "val"))
    samples, published = config.data.samples, PUBLISHED[500]
    average = train // samples, published["train_tokens"] // published["samples"]
    windows = context_window(config.model, train), published["context_window"]
    rows = {
        "training conversations": (samples, published["samples"]),
        "training tokens": (train, published["train_tokens"]),
        "validation tokens": (val, published["val_tokens"]),
        "tokens per conversation, on average": average,
        "contexts without a limit on the window": [window["theoretical_max"] for window in windows],
    }
    return [[name, *(f"{value:,}" for value in values)] for name, values in rows.items()]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    """Return each token of `ids` `[n]` as text; part of a character becomes U+FFFD."""
    return [str(tokenizer.decode([token])) for token in ids.tolist()]


def singular_values(contexts: Tensor) -> Tensor:
    """Compute singular values of uncentred contexts `[n, context_dim]` as shares of their sum, descending."""
    values = torch.linalg.svdvals(contexts.float().cpu())
    return values / values.sum()


@torch.no_grad()
def untrained_contexts(model: ContextKV, cache: StreamCache, shape: ModelConfig, passes: int) -> Tensor:
    """Compute a stream's contexts by passes of an untrained ContextBlock: float32 `[n, context_dim]`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = ContextBlock(shape.context_dim, shape.hidden_size).to(model.device)
    embeddings, tokens = distinct_rows(model, cache.ids[:-1])
    inputs = project_inputs(block, embeddings)
    contexts = torch.zeros_like(cache.contexts, dtype=torch.float32)  # those of training may be bf16
    for _ in range(passes):
        contexts = parallel_pass(block, inputs, tokens, contexts)
    return contexts[1:]


@torch.no_grad()
def pass_errors(model: ContextKV, cache: StreamCache, config: Phase1Config, passes: int) -> list[float]:
    """Measure how far parallel passes are from exact contexts.

    Args:
        cache: of the stream to read.
        passes: how many, starting from N(0, initial_std) as the original's validation contexts do.

    Returns:
        mean squared error of a context component after each pass.
    """
    embeddings, tokens = distinct_rows(model, cache.ids[:-1])
    block, inputs = model.context_block, project_inputs(model.context_block, embeddings)
    exact = exact_contexts(block, inputs, tokens, config.tolerance)
    generator = torch.Generator(model.device).manual_seed(0)
    contexts = draw_contexts(len(tokens), exact.shape[1], config.initial_std, generator)
    errors = []
    for _ in range(passes):
        contexts = parallel_pass(block, inputs, tokens, contexts)
        errors.append((contexts - exact).square().mean().item())
    return errors


@dataclass(frozen=True)
class Trained:
    """A finished run with model, tokenizer and caches."""

    run: Run
    model: ContextKV
    tokenizer: PreTrainedTokenizerBase
    caches: Mapping[str, StreamCache]

    def check_position(self, split: str, position: int) -> None:
        check_split(split)
        count = len(self.caches[split])
        if not (isinstance(position, Integral) and 0 <= position < count):
            allowed = f"a whole number, 0 to {count - 1}"
            raise UserError(f"position is {position!r}; allowed in this {split} stream: {allowed}.")


def open_run(run: Run | Path | str) -> Trained:
    """Load model, tokenizer and caches of a finished run, or of the one in a folder, on the CPU.

    Raises:
        UserError: the run folder lacks one of them, or it is damaged.
    """
    run = run if isinstance(run, Run) else load_run(run)
    refuse_damaged(run.path, "caches")
    model, tokenizer = load_model(run.path, run.config), load_tokenizer(run.config.data.tokenizer)
    caches = {
        split: as_read(model, load_cache(run.path / "caches", split), trained=False) for split in SPLITS
    }
    return Trained(run, model, tokenizer, caches)


@torch.no_grad()
def attention_by_slot(trained: Trained, most: int = 2000) -> Tensor:
    """Average attention weights `[num_heads, slots]` over validation positions with a full window.

    Args:
        most: so many positions at most, evenly spread.
    """
    if most < 1:
        raise UserError(f"most is {most}; allowed: 1 or more.")
    cache, first = trained.caches["val"], trained.model.window.offsets[-1]
    if first >= len(cache):
        raise UserError(
            f"No position has a full window: it takes {first + 1} tokens, and the validation stream has "
            f"{len(cache)}; use more validation conversations."
        )
    positions = torch.linspace(first, len(cache) - 1, min(most, len(cache) - first)).long()
    weights = [attended(trained, cache, part) for part in positions.split(256)]
    return torch.cat(weights).mean(dim=0)


def attended(trained: Trained, cache: StreamCache, positions: Tensor) -> Tensor:
    """Compute attention weights at positions of a cached stream, `[n, num_heads, max_contexts]`.

    Raises:
        UserError: the model of the run has no attention weights.
    """
    _, weights = cache.attend(trained.model, positions)
    if weights is None:
        raise UserError(f"The model of {trained.run.path} returns no attention weights to look at.")
    return weights


@dataclass(frozen=True)
class AttendedWindow:
    """The window that one position attends.

    Attributes:
        pieces: texts of the tokens from the oldest slot, or the stream's beginning, by position.
        slots: positions of the slots, nearest first, int64 `[max_contexts]`; negative before the stream.
        weights: attention weights `[num_heads, max_contexts]`.
        target: the next token.
        is_right: whether the most likely token is the next one; parts of characters look alike as text.
        guesses: the most likely next tokens with their probabilities.
    """

    position: int
    pieces: dict[int, str]
    slots: Tensor
    weights: Tensor
    target: str
    is_right: bool
    guesses: list[tuple[str, float]]


@torch.no_grad()
def attended_window(trained: Trained, split: str, position: int, guesses: int = 5) -> AttendedWindow:
    """Collect the window of one position of a cached stream.

    Raises:
        UserError: no such position.
    """
    trained.check_position(split, position)
    cache = trained.caches[split]
    at = torch.tensor([position])
    weights = attended(trained, cache, at)
    slots = trained.model.window.slots(at)[0]
    (batch,) = cache.batches(at, 1, trained.model)
    likely = batch.logits(trained.model)[0].softmax(dim=-1).topk(guesses)
    start = max(0, int(slots.min()))
    pieces = token_texts(trained.tokenizer, cache.ids[start : position + 2])
    names = token_texts(trained.tokenizer, likely.indices)
    return AttendedWindow(
        position=position,
        pieces=dict(enumerate(pieces[:-1], start)),
        slots=slots,
        weights=weights[0],
        target=pieces[-1],
        is_right=bool(likely.indices[0] == cache.ids[position + 1]),
        guesses=list(zip(names, likely.values.tolist(), strict=True)),
    )


def epoch_rows(run: Run) -> list[list[str]]:
    """Make table rows of early stopping: epoch, PPLs, accuracy, epochs without gain, a note."""
    phase2 = run.summary["phase2"]
    notes = {"worse": "not better", "stopped": f"patience of {run.config.phase2.patience} is used up: stop"}
    rows = []
    for line in phase2["epochs"]:
        note = notes.get(epoch_note(phase2, line), "better: weights kept")
        shown = ppl(line["train_ppl"]), ppl(line["val_ppl"]), percent(line["val_acc"])
        rows.append([str(line["epoch"]), *shown, str(line["no_improve"]), note])
    return rows


def token_name(piece: str) -> str:
    """Name a token, or text, in a sentence or on a list: in quotes, with arrows for line breaks."""
    return repr(piece).replace("\\n", "↵")


def prediction_rows(trained: Trained, positions: Sequence[int], context: int = 12) -> list[list[str]]:
    """Make table rows: text before, the next token, the three best guesses with probabilities."""
    rows = []
    for position in positions:
        window = attended_window(trained, "val", position, guesses=3)
        before = "".join([*window.pieces.values()][-context:])
        best = ", ".join(f"{token_name(text)} {share:.0%}" for text, share in window.guesses)
        right = "yes" if window.is_right else "no"
        rows.append([token_name(before), token_name(window.target), best, right])
    return rows
