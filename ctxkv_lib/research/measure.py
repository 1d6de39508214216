"""Every measure of a trained run, each taken once and kept as a stage of the run folder.

What is kept counts as long as it was measured on the same thing, with the same code.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.conversations import load_conversations
from ..data.counts import count_tokens, unigram_floor
from ..data.embeddings import corpus_counts, corpus_ids
from ..data.tokens import TokenStream, load_tokenizer, validation_stream
from ..errors import memory_advice
from ..files import digest
from ..hf.modeling import ContextKVForCausalLM
from ..method.caches import StreamCache, load_cache, load_ids
from ..method.config import FROZEN_BLOCK, ModelConfig
from ..method.contexts import distinct_rows, stream_contexts
from ..method.evaluation import perplexity, token_scores
from ..progress import say, stage, transformers_bars_hidden
from ..runs.config import ExperimentConfig
from ..runs.provenance import choose_device, code_version
from ..runs.run_folder import RunFolder
from .ablations import ablations, pairs, since_last
from .generation import generation
from .models import model_class, stream_of
from .ngrams import yardsticks
from .probe import probe
from .recall_source import KEYS, pairs_in
from .recall_task import recall_task

# What training did is in the keys of its own stages already.
CODE = {
    "ablations": code_version("runs/inference", "research/ablations"),
    "generation": code_version("research/generation"),
    "probe": code_version("research/decodability", "research/probe"),
    "recall_task": code_version(
        "runs/inference", "research/ablations", "research/recall_task", "research/recall_source"
    ),
    "test": code_version("research/ablations", "research/measure"),
    "yardsticks": code_version("research/ngrams", "research/measure"),
}
PAIRED_WITHIN = ModelConfig().context_window  # tokens back, whatever the run's own window: runs compare
MOST_COUNTED = 5_000_000  # training tokens; their n-grams take about 250 bytes each

Facts = dict[str, Any]


@memory_advice("Measuring the run", "use fewer conversations with --samples")
def measure(config: ExperimentConfig, folder: RunFolder) -> Facts:
    """`probe`, `ablations`, `test` and so on of the summary, as far as the experiment has them.

    Args:
        folder: claimed, of a run that is trained.
    """
    caches, phase2 = (folder.records.stages[name] for name in ("caches", "phase2"))
    contexts, weights = [caches.key, caches.files], [phase2.key, phase2.files]
    test = load_conversations(config.data, "test")
    trained = cache(lambda: _trained(config, folder))

    @cache
    def tested() -> TokenStream | None:
        """The test's stream, if a token of it can be predicted; read only if something is to be measured."""
        stream = validation_stream(test, load_tokenizer(config.data.tokenizer)) if len(test) else None
        return stream if stream and len(stream.ids) > 1 else None

    measures: dict[str, tuple[Any, Callable[[], Facts]]] = {
        "test": (
            [weights, test.fingerprint],
            lambda: _test(config, trained(), stream) if (stream := tested()) else {},
        ),
        "yardsticks": (
            [contexts, test.fingerprint],
            lambda: _yardsticks(config, folder, {"test": stream.ids} if (stream := tested()) else {}),
        ),
    }
    if config.data.source == "recall":
        measures["recall_task"] = ([contexts, weights], lambda: _recall_task(config, folder, trained()))
    if config.model.memory in FROZEN_BLOCK:
        measures |= {
            "probe": (contexts, lambda: probe(config, folder, trained())),
            "ablations": ([contexts, weights], lambda: ablate(config, folder, trained())),
            "generation": (weights, lambda: _generation(config, folder, trained())),
        }
    found = {name: _once(folder, name, *measured) for name, measured in measures.items()}
    return {name: result for name, result in found.items() if result}


def _once(folder: RunFolder, name: str, made_from: Any, make: Callable[[], Facts]) -> Facts:
    """What the folder holds of a measure; made and recorded if it was made from something else."""
    key = digest([made_from, CODE[name]])
    done = folder.finished(name, key)
    if done is None:
        with stage(f"Measuring: {name}"):
            done = folder.finish(name, key, (), make())
    return done.result


def _trained(config: ExperimentConfig, folder: RunFolder) -> ContextKVForCausalLM:
    with transformers_bars_hidden():
        model = model_class(config.model.memory).from_pretrained(folder.model)
    model.to(choose_device(config.runtime.device))  # type: ignore[arg-type]  # transformers hides its signature
    return model


def ablate(config: ExperimentConfig, folder: RunFolder, model: ContextKVForCausalLM) -> Facts:
    """`ablations` of the summary, on the validation stream of a run that has its caches."""
    held_out = load_cache(folder.caches, "val")
    conversations = load_conversations(config.data, "validation")
    starts = validation_stream(conversations, load_tokenizer(config.data.tokenizer)).starts
    counts = count_tokens(load_ids(folder.caches, "train"), config.model.vocab_size)
    return ablations(model, held_out, config.model.context_window, starts, counts)


def _recall_task(config: ExperimentConfig, folder: RunFolder, model: ContextKVForCausalLM) -> Facts:
    tokenizer = load_tokenizer(config.data.tokenizer)
    keys = torch.tensor([tokenizer.encode(f" {key}")[0] for key in KEYS])
    held_out = stream_of(load_cache(folder.caches, "val"), config.model, trained=False)
    found = recall_task(model, held_out, keys, config.data.recall_window)
    return {**found, "values": pairs_in(config.data.recall_window)}


def _generation(config: ExperimentConfig, folder: RunFolder, model: ContextKVForCausalLM) -> Facts:
    return generation(model, load_tokenizer(config.data.tokenizer), load_ids(folder.caches, "val"))


@torch.no_grad()
def _test(config: ExperimentConfig, model: ContextKVForCausalLM, stream: TokenStream) -> Facts:
    """Perplexity and accuracy of the kept weights, with contexts made as those of validation are.

    `repeated_ppl` is that of the tokens that form, with the one before, a pair that the last `PAIRED_WITHIN`
    tokens hold already. `conversations` has the tokens of each that are predicted, and their mean loss.
    """
    ids = stream.ids.int().to(model.device)
    contexts = torch.empty(len(ids), config.model.memory_dim, device=model.device)
    if config.model.memory_dim:
        embeddings, tokens = distinct_rows(model, ids[:-1])
        generator = torch.Generator(model.device).manual_seed(config.runtime.seed)
        half = model.context_block.project_tokens(embeddings)
        stream_contexts(model.context_block, half, tokens, config.phase1, contexts, False, generator)
    cache = stream_of(StreamCache(ids, contexts), config.model, trained=False)
    losses, correct = token_scores(model, cache, torch.arange(len(cache)))
    again = losses[since_last(pairs(ids)) < min(PAIRED_WITHIN, len(losses))]
    return {
        "ppl": perplexity(losses.mean().item()),
        "acc": correct.float().mean().item(),
        "tokens": len(ids),
        "repeated_ppl": perplexity(again.mean().item()) if len(again) else None,
        "repeated_tokens": len(again),
        "conversations": [[len(part), part.mean().item()] for part in _parts(losses, stream.starts)],
    }


def _parts(losses: Tensor, starts: Tensor) -> list[Tensor]:
    """The losses of each conversation; the first is of the stream's second token."""
    return [part for part in losses.tensor_split((starts[1:] - 1).clamp(min=0).cpu()) if len(part)]


def _yardsticks(config: ExperimentConfig, folder: RunFolder, others: dict[str, Tensor]) -> Facts:
    """n-grams counted on the training tokens, on validation and on `others`.

    Of the text that a token table is made from the model knows something: one yardstick counts it, too.
    """
    streams = {split: load_ids(folder.caches, split) for split in ("train", "val")}
    if len(streams["train"]) > MOST_COUNTED:
        say(f"No yardsticks: {len(streams['train']):,} training tokens are more than {MOST_COUNTED:,}.")
        return {}
    size = config.model.vocab_size
    floors = {"uniform": np.full(size, 1 / size)}
    if (counts := corpus_counts(config.data)) is not None:
        floors["table text"] = unigram_floor(counts.weight.numpy())
    ids = {name: stream.numpy().astype(np.int64) for name, stream in (streams | others).items()}
    train, window = ids.pop("train"), config.model.context_window
    found = yardsticks(train, ids, floors, window)
    if config.data.table == "cooccurrence":
        text = corpus_ids(config.data)  # mapped: of a large file only its length is looked at
        if len(text) + len(train) > MOST_COUNTED:
            say(f"No n-grams of the table's text: {len(text):,} tokens are too many ({MOST_COUNTED:,}).")
            return found
        known = text.numpy().astype(np.int64)
        if config.data.corpus == "own":
            known = np.concatenate([known, train])
        found["kneser_ney_table_cache"] = yardsticks(known, ids, floors, window)["kneser_ney_cache"]
    return found
