"""Measurements of a finished run, on request; each is a stage of the run folder."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from ..data.conversations import load_conversations
from ..data.counts import count_tokens, unigram_floor
from ..data.embeddings import corpus_counts, corpus_ids
from ..data.tokens import load_tokenizer, validation_stream
from ..errors import UserError, memory_advice
from ..experiments import write_results
from ..method.config import GPT2_VOCAB_SIZE
from ..method.model import ContextKV
from ..progress import say, stage
from ..runs.caches import load_cache, load_ids
from ..runs.config import ExperimentConfig
from ..runs.plugins import code_version
from ..runs.records import MEASUREMENTS
from ..runs.rows import as_read
from ..runs.run_folder import Run, RunFolder, refuse_damaged
from ..runs.testing import measurement_key, measurements, test_stream, trained_model
from ..runs.trained import for_transformers
from .ablations import ablations
from .generation import generation
from .ngrams import ngram_baselines
from .probe import probe
from .recall_source import KEYS, pairs_in
from .recall_task import recall_task

# In addition to a measurement's own module; stage keys cover the code of training.
CODE = ("hf/inference", "research/decodability", "research/measure", "research/recall_source")
MOST_COUNTED = 5_000_000  # training tokens; their n-grams take about 250 bytes each


Loader = Callable[[], ContextKV]  # of the trained model, which not every measurement needs


@memory_advice("Measuring the run", "use fewer conversations with --samples")
def measure(run: Run, names: Sequence[str] = MEASUREMENTS) -> Run:
    """Compute the missing measurements of a finished run, and write its summary and report anew.

    Args:
        names: of `MEASUREMENTS`. Those that do not apply to the run are left out.

    Raises:
        UserError: an unknown name; none that applies; missing or damaged caches or weights.
    """
    if unknown := [name for name in names if name not in MEASUREMENTS]:
        raise UserError(f"measurement is {unknown[0]!r}; allowed: {', '.join(MEASUREMENTS)}.")
    config, possible = run.config, measurements_of(run.config)
    wanted = [name for name in names if name in possible]
    if not wanted:
        mixer = config.plugins["mixer"].name if "mixer" in config.plugins else "none"
        kind = f"mixer={mixer}, data.source={config.data.source}"
        raise UserError(f"{run.path} has no {' or '.join(names)} ({kind}); it has {' and '.join(possible)}.")
    folder = RunFolder(run.path)
    with folder.claimed(config):
        keys = {name: measurement_key(folder, code_version(f"research/{name}", *CODE)) for name in wanted}
        missing = [name for name in wanted if not folder.finished(name, keys[name])]
        if not missing:
            return run
        for files in ("caches", "phase2"):
            refuse_damaged(run.path, files)
        model = cache(lambda: trained_model(config, folder))
        for name in missing:
            with stage(f"Measuring: {name}"):
                folder.finish(name, keys[name], (), MAKERS[name](config, folder, model))
        summary = {name: part for name, part in run.summary.items() if name not in MEASUREMENTS}
        return write_results(config, folder, {**summary, **measurements(folder)})


def measurements_of(config: ExperimentConfig) -> list[str]:
    """List the measurements that apply to a run of this configuration."""
    lacking = {"probe", "ablations", "generation"} if "mixer" in config.plugins else set()
    if config.data.source != "recall":
        lacking.add("recall_task")
    return [name for name in MEASUREMENTS if name not in lacking]


def _ablations(config: ExperimentConfig, folder: RunFolder, model: Loader) -> dict[str, Any]:
    conversations = load_conversations(config.data, "validation")
    starts = validation_stream(conversations, load_tokenizer(config.data.tokenizer)).starts
    counts = count_tokens(load_ids(folder.caches, "train"), model().wte.num_embeddings)
    held_out = load_cache(folder.caches, "val")
    return ablations(model(), held_out, config.model.context_window, starts, counts)


def _recall_task(config: ExperimentConfig, folder: RunFolder, model: Loader) -> dict[str, Any]:
    tokenizer, window = load_tokenizer(config.data.tokenizer), config.data.recall_window
    keys = torch.tensor([tokenizer.encode(f" {key}")[0] for key in KEYS])
    held_out = as_read(model(), load_cache(folder.caches, "val"), trained=False)
    return {**recall_task(model(), held_out, keys, window), "values": pairs_in(window)}


def _generation(config: ExperimentConfig, folder: RunFolder, model: Loader) -> dict[str, Any]:
    served = for_transformers(model(), config, saved=False)
    return generation(served, load_tokenizer(config.data.tokenizer), load_ids(folder.caches, "val"))


def _ngrams(config: ExperimentConfig, folder: RunFolder, _: Loader) -> dict[str, Any]:
    """Count n-grams on the training tokens, and on those with the text that a token table is made from."""
    streams, starts = {split: load_ids(folder.caches, split) for split in ("train", "val")}, {}
    if stream := test_stream(config):
        streams["test"], starts["test"] = stream.ids, stream.starts.numpy()
    if len(streams["train"]) > MOST_COUNTED:
        say(f"No n-grams: {len(streams['train']):,} training tokens are more than {MOST_COUNTED:,}.")
        return {}
    size, window = GPT2_VOCAB_SIZE, config.model.context_window
    floors = {"uniform": np.full(size, 1 / size)}
    if (counts := corpus_counts(config.data)) is not None:
        floors["table text"] = unigram_floor(counts.weight.numpy())
    ids = {name: stream.numpy().astype(np.int64) for name, stream in streams.items()}
    train = ids.pop("train")
    found = ngram_baselines(train, ids, floors, window, starts)
    if config.data.table == "cooccurrence":
        text = corpus_ids(config.data)  # mapped: only the length of a large file is read
        if len(text) + len(train) > MOST_COUNTED:
            say(f"No n-grams of the table's text: {len(text):,} tokens are too many ({MOST_COUNTED:,}).")
            return found
        known = text.numpy().astype(np.int64)
        if config.data.corpus == "own":  # else the table's text has the training text in it
            known = np.concatenate([known, train])
        rows = ngram_baselines(known, ids, floors, window, starts)
        found |= {f"kneser_ney_table_{kind}": rows[f"kneser_ney_{kind}"] for kind in ("cache", "caches")}
    return found


MAKERS: dict[str, Callable[[ExperimentConfig, RunFolder, Loader], dict[str, Any]]] = {
    "probe": lambda config, folder, model: probe(config, folder, model()),
    "ablations": _ablations,
    "recall_task": _recall_task,
    "generation": _generation,
    "ngrams": _ngrams,
}
