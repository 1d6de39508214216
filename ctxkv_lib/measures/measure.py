"""Every measure of a trained run, each taken once and kept as a stage of the run folder.

What is kept counts as long as it was measured on the same thing, with the same code.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ExperimentConfig
from ..data.conversations import load_conversations
from ..data.embeddings import corpus_counts
from ..data.tokens import load_tokenizer, validation_stream
from ..errors import memory_advice
from ..files import digest
from ..model.modeling import ContextKVForCausalLM
from ..progress import say, stage, transformers_bars_hidden
from ..runs.provenance import choose_device, code_version
from ..runs.run_folder import RunFolder
from ..training.caches import StreamCache, load_ids
from ..training.evaluation import evaluate
from ..training.recurrence import distinct_rows, stream_contexts
from .probe import probe
from .yardsticks import unigram_floor, yardsticks

# What training did is in the keys of its own stages already.
CODE = {
    "probe": code_version("model/windows", "measures/recall", "measures/probe"),
    "test": code_version("measures/measure"),
    "yardsticks": code_version("measures/yardsticks", "measures/measure"),
}
MOST_COUNTED = 5_000_000  # training tokens; their n-grams take about 250 bytes each

Facts = dict[str, Any]


@memory_advice("Measuring the run", "use fewer conversations with --samples")
def measure(config: ExperimentConfig, folder: RunFolder) -> Facts:
    """`probe`, `test` and `yardsticks` of the summary, as far as the experiment has them.

    Args:
        folder: claimed, of a run that is trained.
    """
    caches, phase2 = (folder.records.stages[name] for name in ("caches", "phase2"))
    contexts, weights = [caches.key, caches.files], [phase2.key, phase2.files]
    test = load_conversations(config.data, "test")
    tested = cache(lambda: validation_stream(test, load_tokenizer(config.data.tokenizer)).ids)
    trained = cache(lambda: _trained(config, folder))

    def on_test() -> Facts:
        return _test(config, trained(), tested()) if len(test) else {}

    def counted() -> Facts:
        return _yardsticks(config, folder, {"test": tested()} if len(test) else {})

    found = {
        "probe": _once(folder, "probe", contexts, lambda: probe(config, folder, trained())),
        "test": _once(folder, "test", [weights, test.fingerprint], on_test),
        "yardsticks": _once(folder, "yardsticks", [contexts, test.fingerprint], counted),
    }
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
        model = ContextKVForCausalLM.from_pretrained(folder.model)
    model.to(choose_device(config.runtime.device))  # type: ignore[arg-type]  # transformers hides its signature
    return model


@torch.no_grad()
def _test(config: ExperimentConfig, model: ContextKVForCausalLM, stream: Tensor) -> Facts:
    """Perplexity and accuracy of the kept weights, with contexts made as those of validation are."""
    ids = stream.int().to(model.device)
    embeddings, tokens = distinct_rows(model, ids[:-1])
    contexts = torch.empty(len(ids), config.model.context_dim, device=model.device)
    generator = torch.Generator(model.device).manual_seed(config.runtime.seed)
    half = model.context_block.project_tokens(embeddings)
    stream_contexts(model.context_block, half, tokens, config.phase1, contexts, False, generator)
    score = evaluate(model, StreamCache(ids, contexts))
    return {"ppl": score.perplexity, "acc": score.accuracy, "tokens": len(ids)}


def _yardsticks(config: ExperimentConfig, folder: RunFolder, others: dict[str, Tensor]) -> Facts:
    """n-grams counted on the training tokens, on validation and on `others`."""
    streams = {split: load_ids(folder.caches, split) for split in ("train", "val")}
    if len(streams["train"]) > MOST_COUNTED:
        say(f"No yardsticks: {len(streams['train']):,} training tokens are more than {MOST_COUNTED:,}.")
        return {}
    size = config.model.vocab_size
    floors = {"uniform": np.full(size, 1 / size)}
    if (counts := corpus_counts(config.data, size)) is not None:
        floors["table text"] = unigram_floor(counts.weight.numpy())
    ids = {name: stream.numpy().astype(np.int64) for name, stream in (streams | others).items()}
    return yardsticks(ids.pop("train"), ids, floors, config.model.context_window)
