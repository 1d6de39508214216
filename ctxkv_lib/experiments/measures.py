"""What is measured of a trained run beside its training: test split, yardsticks, what its contexts remember.

Each is measured once, and kept in the run folder with the key of what it was measured on.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ExperimentConfig
from ..data.conversations import load_conversations
from ..data.embeddings import table_text_counts
from ..data.tokens import load_tokenizer, validation_stream
from ..files import digest, read_json, write_json
from ..model.modeling import ContextKVForCausalLM
from ..progress import say, transformers_bars_hidden
from ..runs.provenance import choose_device, code_version
from ..runs.run_folder import RunFolder
from ..training.caches import StreamCache, load_cache
from ..training.evaluation import evaluate
from ..training.recurrence import distinct_rows, stream_contexts
from ..training.yardsticks import unigram_floor, yardsticks
from ..views.figures import save
from ..views.pictures import memory_of_contexts
from .probe import probe

CODE = {
    "test": code_version("data/tokens", "model/modeling", "model/windows", "training/recurrence"),
    "yardsticks": code_version("data/tokens", "training/yardsticks"),
    "probe": code_version("model/modeling", "model/windows", "training/recall", "experiments/probe"),
}
MOST_COUNTED = 5_000_000  # training tokens; their n-grams take about 250 bytes each

Result = dict[str, Any]


def measure(config: ExperimentConfig, folder: RunFolder, attention: Result) -> Result:
    """`test`, `yardsticks` and `probe` of the summary, as far as the experiment has them.

    Args:
        folder: of a run that is trained.
        attention: what Phase 2 recorded; no other training has the same.
    """
    trained = cache(lambda: _trained(config, folder))
    found: Result = {"probe": kept(folder, "probe", attention, lambda: probe(config, folder, trained()))}
    save(memory_of_contexts(found["probe"], config.model), folder.figures / "probe.png")
    key: list[Any]
    test = load_conversations(config.data, "test")
    test_ids = cache(lambda: validation_stream(test, load_tokenizer(config.data.tokenizer)).ids)
    if test.ids:
        key = [attention, test.fingerprint]
        found["test"] = kept(folder, "test", key, lambda: _test(config, trained(), test_ids()))
    elif config.data.test_samples:
        say(f"No test split: training leaves fewer than {config.data.test_samples} conversations for it.")
    train_tokens = len(load_cache(folder.caches, "train").ids)
    if train_tokens > MOST_COUNTED:
        say(f"No yardsticks: {train_tokens:,} training tokens are more than the {MOST_COUNTED:,} counted.")
    else:
        texts = [attention["provenance"][name] for name in ("data", "embeddings")]
        key = [texts, test.fingerprint, asdict(config.data), config.model.context_window]
        streams = {"test": test_ids} if test.ids else {}
        found["yardsticks"] = kept(folder, "yardsticks", key, lambda: _yardsticks(config, folder, streams))
    return found


def kept(folder: RunFolder, name: str, key: Any, make: Callable[[], Result]) -> Result:
    """What was measured before with the same key and code, or what `make` returns, which is then kept."""
    path = folder.path / "measured.json"
    measured = read_json(path) if path.is_file() else {}
    found = measured.get(name)
    current = digest([key, CODE[name]])
    if found is None or found["key"] != current:
        found = {"key": current, "result": make()}
        write_json(path, {**measured, name: found})
    return found["result"]


def _trained(config: ExperimentConfig, folder: RunFolder) -> ContextKVForCausalLM:
    with transformers_bars_hidden():
        model = ContextKVForCausalLM.from_pretrained(folder.model)
    model.to(choose_device(config.runtime.device))  # type: ignore[arg-type]  # transformers hides its signature
    return model


@torch.no_grad()
def _test(config: ExperimentConfig, model: ContextKVForCausalLM, stream: Tensor) -> Result:
    """Perplexity and accuracy of the kept weights, with contexts made as those of validation are."""
    ids = stream.int().to(model.device)
    embeddings, tokens = distinct_rows(model, ids[:-1])
    contexts = torch.empty(len(ids), config.model.context_dim, device=model.device)
    generator = torch.Generator(model.device).manual_seed(config.runtime.seed)
    half = model.context_block.project_tokens(embeddings)
    stream_contexts(model.context_block, half, tokens, config.phase1, contexts, False, generator)
    score = evaluate(model, StreamCache(ids, contexts))
    return {"ppl": score.perplexity, "acc": score.accuracy, "tokens": len(ids)}


def _yardsticks(
    config: ExperimentConfig, folder: RunFolder, others: Mapping[str, Callable[[], Tensor]]
) -> Result:
    size = config.model.vocab_size
    floors = {"uniform": np.full(size, 1 / size)}
    counts = table_text_counts(config.data, size)
    if counts is not None:
        floors["table text"] = unigram_floor(counts.numpy())
    train, val = (load_cache(folder.caches, split).ids.numpy().astype(np.int64) for split in ("train", "val"))
    streams = {"val": val, **{name: ids().numpy() for name, ids in others.items()}}
    return yardsticks(train, streams, floors, config.model.context_window)
