"""Phase 1 and the caches of contexts made from it: done only if the run folder does not hold them intact."""

from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ranks
from ..errors import memory_advice
from ..files import read_tensors, write_tensors
from ..hf.modeling import parameter_counts
from ..method.caches import StreamCache, dense_embeddings, held_mib, save_cache
from ..method.contexts import distinct_rows, stream_contexts
from ..method.evaluation import effective_rank
from ..method.memory import snapshot
from ..method.oacd import UNTRAINED, begin, train_context_block
from ..progress import Metric, notice, stage
from .inputs import Facts, Work
from .machine import use_machine
from .placement import scratch
from .provenance import PRECISIONS
from .records import Record
from .settings import BEGINNING_TOKENS
from .streamed import read_once, sampled


def make_contexts(work: Work) -> tuple[Record, Record]:
    """Leave the trained ContextBlock in model and folder, and the caches in the folder; both records."""
    inputs, folder = work.inputs, work.folder
    phase1 = folder.finished("phase1", inputs.phase1_key())
    precision = use_machine(work, phase1)
    caches = phase1 and folder.finished("caches", inputs.caches_key(phase1, precision))
    if phase1 and not caches and inputs.config.phase1.contexts == "passes":
        notice("phase1.contexts=passes: caches come from Phase 1's last iteration, so Phase 1 is repeated.")
        phase1 = None
    if phase1:
        work.model.context_block.load_state_dict(read_tensors(folder.context_block))
        folder.keep_metrics(phase1)
        work.replay(phase1)
    if phase1 and caches:
        return phase1, caches
    generator = torch.Generator(work.model.device).manual_seed(inputs.config.runtime.seed)
    rows = {split: len(ids) for split, ids in work.ids.items()}
    if inputs.config.is_streamed(rows["train"]):  # the caches do not need Phase 1's contexts
        phase1 = phase1 or _train(work, _room(work, len(_sampled(work)) + 1, spare_memory=True), generator)
        rows["train"] = min(rows["train"], BEGINNING_TOKENS + 1)
    contexts = {split: _room(work, count) for split, count in rows.items()}
    phase1 = phase1 or _train(work, contexts["train"], generator)
    made = ranks.from_first(lambda: _make_caches(work, contexts, generator, precision))
    return phase1, folder.finish("caches", inputs.caches_key(phase1, precision), [folder.caches], made)


def _room(work: Work, count: int, dtype: torch.dtype = torch.float32, spare_memory: bool = False) -> Tensor:
    """Room for `count` contexts."""
    shape = count, work.inputs.config.model.memory_dim
    return scratch(shape, dtype, work.model.device, work.folder.caches, spare_memory)


def context_facts(phase1: Record, caches: Record) -> Facts:
    """`tokens`, `phase1`, `parameters`, `memory` and `caches_mib` of the summary."""
    facts = {**phase1.result, "caches_mib": caches.result["caches_mib"]}
    return {**facts, "phase1": {**facts["phase1"], **caches.result["phase1"]}}


@memory_advice("Phase 1", "lower phase1.batch_size, or use fewer conversations with --samples")
def _train(work: Work, contexts: Tensor, generator: torch.Generator) -> Record:
    """Phase 1, as far as the model has one; leaves the last iteration's contexts in `contexts`."""
    key = work.inputs.phase1_key()
    work.folder.keep_metrics()
    metrics: list[Metric] = []
    block, config, ids = work.model.context_block, work.inputs.config, _sampled(work)
    result = UNTRAINED
    if config.model.memory in ("fresh", "end_to_end"):
        begin(block, *distinct_rows(work.model, ids), config.phase1)
    elif config.model.memory == "contexts":
        work.model.set_phase(1)
        result = train_context_block(
            block,
            *distinct_rows(work.model, ids),
            config.phase1,
            contexts[: len(ids) + 1],
            generator,
            work.recorded(metrics),
            work.folder.phase1_checkpoint,
            key,
        )
        work.model.set_phase(2)
    ranks.from_first(lambda: write_tensors(work.folder.context_block, block.state_dict()))
    facts = {
        "tokens": {split: len(ids) for split, ids in work.ids.items()},
        "phase1": {**asdict(result), "seconds": round(result.seconds, 3)},
        "parameters": parameter_counts(work.model),
        "memory": [*work.memory, snapshot("phase 1 done", work.model.device)],
    }
    return work.folder.finish("phase1", key, [work.folder.context_block], facts, metrics)


def _sampled(work: Work) -> Tensor:
    """The training tokens of Phase 1."""
    return sampled(work.ids["train"][:-1], work.inputs.config.phase1)


def _make_caches(
    work: Work, contexts: dict[str, Tensor], generator: torch.Generator, precision: str
) -> Facts:
    """Leave the caches, from the trained ContextBlock and, if by passes, Phase 1's last `contexts`."""
    inputs = work.inputs
    with stage("Computing the contexts of all positions"):
        made = {s: _cache(work, s, contexts[s], generator, precision) for s in work.ids}
    errors = [each.error for each in made.values() if each.error is not None]
    settings = inputs.config.phase1
    rank_generator = torch.Generator().manual_seed(inputs.config.runtime.seed)
    return {
        "phase1": {
            "effective_rank": effective_rank(contexts["val"][1:], settings.rank_rows, rank_generator)
            if inputs.config.model.memory_dim
            else None,
            "contexts": settings.contexts,
            "contexts_max_error": max(errors, default=None),
        },
        "caches_mib": held_mib(made["train"].cache, made["val"].cache, made["train"].starts),
    }


class _Made(NamedTuple):
    cache: StreamCache
    starts: Tensor | None  # of a streamed stream
    error: float | None  # the largest of a component of exact contexts


def _cache(work: Work, split: str, contexts: Tensor, generator: torch.Generator, precision: str) -> _Made:
    """Make a stream's contexts, in place, and leave its cache in the folder."""
    config, model, ids = work.inputs.config, work.model, work.ids[split]
    trained, starts = split == "train", None
    error: float | None = None
    if trained and config.is_streamed(len(ids)):
        starts, error = read_once(model, ids, config.phase1.tolerance, contexts)
    else:
        ids = ids.to(model.device, torch.int32)
        if config.model.memory_dim:
            embeddings, tokens = distinct_rows(model, ids[:-1])
            half = model.context_block.project_tokens(embeddings)
            known = trained and config.model.memory == "contexts"
            error = stream_contexts(
                model.context_block, half, tokens, config.phase1, contexts, known, generator
            )
    dtype = PRECISIONS[precision]
    if trained and dtype != contexts.dtype:
        contexts = _room(work, len(contexts), dtype).copy_(contexts)
    dense = dense_embeddings(model, ids) if config.runtime.embedding_cache == "dense" else None
    made = _Made(StreamCache(ids, contexts, dense), starts, error)
    save_cache(work.folder.caches, split, made.cache, starts)
    return made
